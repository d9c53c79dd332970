"""Policies: distributions over plans, from which every image draws its own (paper, section 4.2)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from featdistill.command_line import UserError, one_of
from featdistill.distortions.chain_sampling import SubsetSampler
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import LEVELS, MIN_SIDE_PX, Operation
from featdistill.distortions.plan import Plan, Step


class Tier(NamedTuple):
    """One severity of a policy that mixes several.

    Attributes:
        weight: images get a tier in proportion to the weights.
        min_operations: fewest operations of its images; 0 with a maximum of 0: they are not distorted.
        max_operations: most operations; all numbers from `min_operations` on are equally likely.
        level_mean, level_std: see `DistortionPolicy`.
    """

    weight: float
    min_operations: int
    max_operations: int
    level_mean: float = 1.0
    level_std: float = 2.5


@dataclass(frozen=True)
class DistortionPolicy:
    """A distribution over plans. The defaults are those of the organizers' training pipeline.

    Without `counts`, a library is drawn, then a number of its groups, then one operation of each, so an
    operation of a small group is drawn more often; `draw_by="operation"` makes all equally frequent. With
    `counts`, a number of different operations is drawn such that each occurs as often as its count says.

    Attributes:
        probability: of an image to be distorted at all.
        libraries: name -> weight; each image uses one library, drawn in proportion to the weights.
        min_operations: fewest operations of a distorted image.
        max_operations: most operations; all numbers from `min_operations` on are equally likely.
        lengths: weights of 1, 2, ... operations, instead of equally likely numbers.
        level_mean: level L has the weight exp(-(L - level_mean)^2 / (2 level_std^2)).
        level_std: see `level_mean`; `inf` makes all levels equally likely.
        tiers: severities, one of which is drawn for each distorted image; they replace `min_operations`,
            `max_operations`, `lengths`, `level_mean` and `level_std`.
        uniform_levels: names of libraries whose levels are equally likely regardless of `level_mean`.
        draw_by: `group`, or `operation` to draw different operations regardless of their groups.
        weights: group or operation -> weight within its library or group (1 by default); an operation of
            weight 0 is never drawn.
        include: names of the only operations that may be drawn; empty means all.
        exclude: names of operations that are not drawn.
        keeps_layout_only: draw only operations that keep every patch visible and in place.
        counts: library -> operation -> number of chains with it, up to a common factor; replaces `libraries`
            and `weights`.
        distort_at: `native` (the stored image) or `input` (resized to the network's input).
        max_side_px: the longer side to which larger images are first reduced, distorted or not; an expert
            that was trained with it reduces what it scores as well.

    Raises:
        UserError: a value is out of range, a name is unknown, or nothing is left to draw from.
    """

    probability: float = 1.0
    libraries: Mapping[str, float] = field(default_factory=lambda: {"official": 1.0})
    min_operations: int = 1
    max_operations: int = 3
    lengths: tuple[float, ...] = ()
    level_mean: float = 1.0
    level_std: float = 2.5
    tiers: tuple[Tier, ...] = ()
    uniform_levels: tuple[str, ...] = ()
    draw_by: str = "group"
    weights: Mapping[str, float] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keeps_layout_only: bool = False
    counts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    distort_at: str = "native"
    max_side_px: int | None = None

    def __post_init__(self) -> None:
        for name in ("libraries", "weights"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        object.__setattr__(self, "counts", {library: dict(of) for library, of in self.counts.items()})
        for name in ("include", "exclude", "uniform_levels", "lengths"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise _error(f"{name} must be a list, not '{value}'")
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "tiers", tuple(Tier(*tier) for tier in self.tiers))
        self._check_numbers()
        self._check_names()

    def draw(self, rng: np.random.Generator) -> Plan:
        """Draw a plan from an image's generator; it is empty for an image that is not distorted."""
        if rng.random() >= self.probability:
            return ()
        if self.tiers:
            policies, bounds = self._of_tiers
            return policies[_weighted(rng, bounds)].draw(rng)
        chain = self._draw_by_counts(rng) if self.counts else self._draw_by_groups(rng)
        steps = []
        for library, name in chain:
            level = LEVELS[_weighted(rng, self._level_bounds[library in self.uniform_levels])]
            steps.append(Step(library, name, level, int(rng.integers(2**63))))
        return tuple(steps)

    def _draw_by_groups(self, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        """Yield operations of one library, each from a different group (see `draw_by`), in random order."""
        library = list(self._groups)[_weighted(rng, self._library_bounds)]
        weights, groups = self._groups[library]
        # The first of waiting times with rates in proportion to the weights: a draw without replacement.
        arrivals = rng.exponential(size=len(groups)) / weights
        for group in np.argsort(arrivals)[: self._draw_length(rng)]:
            names, bounds = groups[group]
            yield library, names[_weighted(rng, bounds)]

    def _draw_by_counts(self, rng: np.random.Generator) -> list[tuple[str, str]]:
        operations, sampler = self._counted
        return [operations[index] for index in rng.permutation(sampler.draw(rng))]

    def _draw_length(self, rng: np.random.Generator) -> int:
        if self.lengths:
            return 1 + _weighted(rng, _cumulative(self.lengths))
        return int(rng.integers(self.min_operations, self.max_operations + 1))

    @cached_property
    def _of_tiers(self) -> tuple[list["DistortionPolicy"], np.ndarray]:
        """The policy of each tier's images, and bounds for `_weighted`."""
        common = replace(self, tiers=(), lengths=(), probability=1.0)
        policies = []
        for tier in self.tiers:
            changes = {key: value for key, value in tier._asdict().items() if key != "weight"}
            is_clean = tier.max_operations == tier.min_operations == 0
            policies.append(replace(common, **{"probability": 0.0} if is_clean else changes))
        return policies, _cumulative([tier.weight for tier in self.tiers])

    @cached_property
    def _groups(self) -> dict[str, tuple[np.ndarray, list[tuple[list[str], np.ndarray]]]]:
        """By library: the weights of its groups, and the operations of each with bounds for `_weighted`."""
        result = {}
        for library in (name for name, weight in self.libraries.items() if weight > 0):
            groups: dict[str, list[str]] = {}
            weights: dict[str, float] = {}
            for operation in LIBRARIES[library].values():
                weight = self._weight(operation.category)
                if not self._allows(operation) or weight == 0:
                    continue
                by_group = self.draw_by == "group"
                group = operation.category if by_group else operation.name
                groups.setdefault(group, []).append(operation.name)
                weights[group] = weight if by_group else weight * self._weight(operation.name)
            drawable = [(names, _cumulative(list(map(self._weight, names)))) for names in groups.values()]
            result[library] = np.array(list(weights.values())), drawable
        return result

    def _weight(self, name: str) -> float:
        return self.weights.get(name, 1.0)

    @cached_property
    def _counted(self) -> tuple[list[tuple[str, str]], SubsetSampler]:
        """The (library, operation) pairs that may be drawn, and the sampler of their indices."""
        counts = {
            (library, name): count
            for library, operations in self.counts.items()
            for name, count in operations.items()
            if count > 0 and self._allows(LIBRARIES[library][name])
        }
        if len(counts) < 2:
            raise _error("include and exclude must leave two operations with counts")
        lengths = self.lengths or [0] * (self.min_operations - 1) + [1] * (
            self.max_operations - self.min_operations + 1
        )
        lengths = np.array(lengths[: len(counts) - 1], float)
        mean = lengths @ np.arange(1, len(lengths) + 1) / max(lengths.sum(), 1e-9)
        shares = np.array(list(counts.values()), float)
        try:
            return list(counts), SubsetSampler(shares * mean / max(shares.sum(), 1e-9), lengths)
        except ValueError as error:
            raise _error(f"counts and chain lengths do not agree: {error}") from error

    @cached_property
    def _library_bounds(self) -> np.ndarray:
        return _cumulative([self.libraries[name] for name in self._groups])

    @cached_property
    def _level_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Bounds by the policy's mean and standard deviation, and of equally likely levels."""
        exponents = [(level - self.level_mean) ** 2 / (2 * self.level_std**2) for level in LEVELS]
        by_mean = _cumulative([math.exp(min(exponents) - exponent) for exponent in exponents])
        return by_mean, _cumulative([1.0] * len(LEVELS))

    def _allows(self, operation: Operation) -> bool:
        if operation.name not in self.include and operation.missing():
            return False
        return (
            (not self.include or operation.name in self.include)
            and operation.name not in self.exclude
            and self._weight(operation.name) > 0
            and (operation.keeps_layout or not self.keeps_layout_only)
        )

    def _check_numbers(self) -> None:
        smallest, largest, side = self.min_operations, self.max_operations, self.max_side_px
        checks = {
            f"probability must be between 0 and 1, not {self.probability}": 0 <= self.probability <= 1,
            f"1 <= min_operations <= max_operations must hold, not {smallest} and {largest}": (
                1 <= smallest <= largest
            ),
            f"lengths must be weights of 0 or more, not all 0, not {self.lengths}": (
                not self.lengths or _are_weights(self.lengths)
            ),
            f"tiers must have weights of 0 or more, not all 0, not {[tier.weight for tier in self.tiers]}": (
                not self.tiers or _are_weights([tier.weight for tier in self.tiers])
            ),
            f"level_mean must be a finite number, not {self.level_mean}": math.isfinite(self.level_mean),
            f"level_std must be above 0, not {self.level_std}": self.level_std > 0,
            f"distort_at must be native or input, not {self.distort_at}": (
                self.distort_at in ("native", "input")
            ),
            f"draw_by must be group or operation, not {self.draw_by}": self.draw_by in ("group", "operation"),
            f"max_side_px must be {MIN_SIDE_PX} or more, not {side}": side is None or side >= MIN_SIDE_PX,
        }
        for problem, is_valid in checks.items():
            if not is_valid:
                raise _error(problem)

    def _check_names(self) -> None:
        used = self.counts or self.libraries
        for library in (*self.libraries, *self.counts, *self.uniform_levels):
            one_of("distortion library", library, LIBRARIES)
        for library, counts in self.counts.items():
            for name in counts:
                one_of(f"operation of library {library}", name, LIBRARIES[library])
        operations = {name: operation for library in used for name, operation in LIBRARIES[library].items()}
        for name in self.include + self.exclude:
            one_of("distortion operation", name, sorted(operations))
        groups = {operation.category for operation in operations.values()}
        for name in self.weights:
            one_of("distortion operation or group", name, sorted({*operations, *groups}))
        for name, weight in (*self.libraries.items(), *self.weights.items()):
            if not _are_weights([weight, 1.0]):
                raise _error(f"the weight of {name} must be 0 or more, not {weight}")
        if not any(self.libraries.values()):
            raise _error("at least one library needs a weight above 0")
        if self.tiers:
            self._of_tiers  # noqa: B018 (built now, so impossible tiers are refused now)
            return
        if self.counts:
            self._counted[1].odds  # noqa: B018 (fitted now, so impossible counts are refused now)
            return
        for library, (_, groups_of_library) in self._groups.items():
            if not groups_of_library:
                raise _error(
                    f"no operation of library {library} is left by include, exclude, weights and "
                    "keeps_layout_only; drop one of them or set the library's weight to 0"
                )
            # With fewer left by include and the like, an image gets all there are.
            kind = "category" if self.draw_by == "group" else "name"
            most = len({getattr(operation, kind) for operation in LIBRARIES[library].values()})
            if not self.lengths and self.min_operations > most:
                raise _error(
                    f"{self.min_operations} operations or more are requested, and at most {most} of library "
                    f"{library} can be drawn for one image"
                )


def _error(problem: str) -> UserError:
    return UserError(f"distortion policy: {problem}")


def _are_weights(values: Sequence[float]) -> bool:
    return all(value >= 0 and math.isfinite(value) for value in values) and any(values)


def _cumulative(weights: Sequence[float]) -> np.ndarray:
    total = np.cumsum(weights)
    return total / total[-1]


def _weighted(rng: np.random.Generator, bounds: np.ndarray) -> int:
    """Return the index of the interval of `bounds` (ascending to 1) that a uniform draw falls into."""
    return int(np.searchsorted(bounds, rng.random(), side="right"))
