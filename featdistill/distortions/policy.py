"""What is done to an image: which library, which operations, how strong, with which seed.

A policy draws a plan (plain data: steps with a level and a seed of their own), and the plan is applied later.
So a plan can be logged, kept in a manifest, sent to another process, and applied again with the same result.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from featdistill.command_line import UserError, one_of
from featdistill.distortions.chain_sampling import SubsetSampler
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import LEVELS, MIN_SIDE_PX, Operation
from featdistill.distortions.plan import Plan, Step


@dataclass(frozen=True)
class DistortionPolicy:
    """A distribution over plans. The defaults are those of the organisers' training pipeline.

    A chain is drawn in one of two ways. Without `counts`: a library, then a number of its groups, then an
    operation of each. With `counts`: a number of operations, then as many different ones, so that every one
    is in as many chains as its count says.

    Attributes:
        probability: that an image is distorted at all.
        libraries: name -> weight; one library is drawn for each image, in proportion to the weights.
        min_operations: fewest operations of a distorted image.
        max_operations: most operations; every number from the fewest to the most is equally likely.
        lengths: weights of 1, 2, .. operations, instead of equally likely numbers.
        level_mean: level L has the weight exp(-(L - level_mean)^2 / (2 level_std^2)).
        level_std: see `level_mean`; `inf` makes all levels equally likely.
        uniform_levels: names of libraries whose levels are equally likely all the same.
        weights: group or operation -> weight within its library or group, where it is not 1; an operation of
            weight 0 is not drawn.
        include: names of the only operations that may be drawn; empty means all.
        exclude: names of operations that are not drawn.
        keeps_layout_only: draw only operations under which every patch keeps its place.
        counts: library -> operation -> how many chains have it, to a common factor; `libraries` and `weights`
            then do not count.
        distort_at: `native` (the image as it was stored) or `input` (resized to the network's input).
        max_side_px: images whose longer side exceeds this are reduced to it before all else, distorted or
            not; None leaves them as they are.

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
    uniform_levels: tuple[str, ...] = ()
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
                raise UserError(f"distortion policy: {name} must be a list, not '{value}'")
            object.__setattr__(self, name, tuple(value))
        self._check_numbers()
        self._check_names()

    def draw(self, rng: np.random.Generator) -> Plan:
        """Draw a plan.

        Args:
            rng: the image's generator, see `training_generator` and `evaluation_generator`.

        Returns:
            The steps in the order of their application; empty for an image that is not distorted.
        """
        if rng.random() >= self.probability:
            return ()
        chain = self._draw_by_counts(rng) if self.counts else self._draw_by_groups(rng)
        steps = []
        for library, name in chain:
            level = LEVELS[_weighted(rng, self._level_bounds[library in self.uniform_levels])]
            steps.append(Step(library, name, level, int(rng.integers(2**63))))
        return tuple(steps)

    def _draw_by_groups(self, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        """Yield operations of one library, each of another group, in random order."""
        libraries = list(self._groups)
        library = libraries[_weighted(rng, self._library_bounds)]
        groups = self._groups[library]
        # The first of waiting times with rates in proportion to the weights: a draw without replacement.
        arrivals = rng.exponential(size=len(groups)) / self._group_weights[library]
        for place in np.argsort(arrivals)[: self._draw_length(rng)]:
            names, bounds = groups[place]
            yield library, names[_weighted(rng, bounds)]

    def _draw_by_counts(self, rng: np.random.Generator) -> list[tuple[str, str]]:
        operations, sampler = self._counted
        return [operations[place] for place in rng.permutation(sampler.draw(rng))]

    def _draw_length(self, rng: np.random.Generator) -> int:
        if self.lengths:
            return 1 + _weighted(rng, _cumulative(self.lengths))
        return int(rng.integers(self.min_operations, self.max_operations + 1))

    @cached_property
    def _groups(self) -> dict[str, list[tuple[list[str], np.ndarray]]]:
        """The operations that may be drawn, by library and group: their names, and what `_weighted` takes."""
        return {
            library: [
                (names, _cumulative([self.weights.get(name, 1.0) for name in names]))
                for names in self._names_by_group(library).values()
            ]
            for library in self._drawn_libraries()
        }

    @cached_property
    def _group_weights(self) -> dict[str, np.ndarray]:
        return {
            library: np.array([self.weights.get(group, 1.0) for group in self._names_by_group(library)])
            for library in self._drawn_libraries()
        }

    def _drawn_libraries(self) -> list[str]:
        return [name for name, weight in self.libraries.items() if weight > 0]

    def _names_by_group(self, library: str) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for operation in LIBRARIES[library].values():
            if self._allows(operation) and self.weights.get(operation.category, 1.0) > 0:
                groups.setdefault(operation.category, []).append(operation.name)
        return groups

    @cached_property
    def _counted(self) -> tuple[list[tuple[str, str]], SubsetSampler]:
        """The (library, operation) pairs that may be drawn, and what draws their places."""
        counts = {
            (library, name): count
            for library, operations in self.counts.items()
            for name, count in operations.items()
            if count > 0 and self._allows(LIBRARIES[library][name])
        }
        if len(counts) < 2:
            raise UserError("distortion policy: include and exclude must leave two operations with counts")
        lengths = self.lengths or [0] * (self.min_operations - 1) + [1] * (
            self.max_operations - self.min_operations + 1
        )
        lengths = np.array(lengths[: len(counts) - 1], float)
        mean = lengths @ np.arange(1, len(lengths) + 1) / max(lengths.sum(), 1e-9)
        shares = np.array(list(counts.values()), float)
        try:
            return list(counts), SubsetSampler(shares * mean / max(shares.sum(), 1e-9), lengths)
        except ValueError as error:
            raise UserError(f"distortion policy: counts and chain lengths do not agree: {error}") from error

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
            and self.weights.get(operation.name, 1.0) > 0
            and (operation.keeps_layout or not self.keeps_layout_only)
        )

    def _check_numbers(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UserError(f"distortion policy: probability must be within 0 and 1, not {self.probability}")
        if not 1 <= self.min_operations <= self.max_operations:
            raise UserError(
                "distortion policy: 1 <= min_operations <= max_operations must hold, "
                f"not min_operations {self.min_operations} and max_operations {self.max_operations}"
            )
        if self.lengths and not _are_weights(self.lengths):
            raise UserError(f"distortion policy: lengths must be weights, not all 0, not {self.lengths}")
        if not math.isfinite(self.level_mean):
            raise UserError(f"distortion policy: level_mean must be a number, not {self.level_mean}")
        if not self.level_std > 0:
            raise UserError(f"distortion policy: level_std must be above 0, not {self.level_std}")
        if self.distort_at not in ("native", "input"):
            raise UserError(f"distortion policy: distort_at must be native or input, not {self.distort_at}")
        if self.max_side_px is not None and self.max_side_px < MIN_SIDE_PX:
            raise UserError(
                f"distortion policy: max_side_px must be {MIN_SIDE_PX} or more, not {self.max_side_px}"
            )

    def _check_names(self) -> None:
        used = self.counts or self.libraries
        for library in (*self.libraries, *self.counts, *self.uniform_levels):
            one_of("distortion library", library, LIBRARIES)
        for library, weight in self.libraries.items():
            if not _are_weights([weight, 1.0]):
                raise UserError(
                    f"distortion policy: the weight of library {library} must be 0 or more, not {weight}"
                )
        if not any(self.libraries.values()):
            raise UserError("distortion policy: at least one library needs a weight above 0")
        for library, counts in self.counts.items():
            for name in counts:
                one_of(f"operation of library {library}", name, LIBRARIES[library])
        operations = {name: operation for library in used for name, operation in LIBRARIES[library].items()}
        for name in self.include + self.exclude:
            one_of("distortion operation", name, sorted(operations))
        groups = {operation.category for operation in operations.values()}
        for name, weight in self.weights.items():
            one_of("distortion operation or group", name, sorted({*operations, *groups}))
            if not _are_weights([weight, 1.0]):
                raise UserError(f"distortion policy: the weight of {name} must be 0 or more, not {weight}")
        if self.counts:
            self._counted[1].odds  # noqa: B018 (fitted now, so that impossible counts are refused now)
            return
        for library, of_library in self._groups.items():
            if not of_library:
                raise UserError(
                    f"distortion policy: no operation of library {library} is left by include, exclude, "
                    "weights and keeps_layout_only; drop one of them or give the library the weight 0"
                )


def _are_weights(values: Sequence[float]) -> bool:
    return all(value >= 0 and math.isfinite(value) for value in values) and any(values)


def _cumulative(weights: Sequence[float]) -> np.ndarray:
    total = np.cumsum(weights)
    return total / total[-1]


def _weighted(rng: np.random.Generator, bounds: np.ndarray) -> int:
    """Return the index of the interval of `bounds` (rising to 1) that a uniform draw falls into."""
    return int(np.searchsorted(bounds, rng.random(), side="right"))
