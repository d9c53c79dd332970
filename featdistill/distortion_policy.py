"""What is done to an image: which library, which operations, how strong, with which seed.

A policy draws a plan (plain data: steps with a level and a seed of their own), and the plan is applied later.
So a plan can be logged, kept in a manifest, sent to another process, and applied again with the same result.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from distortions_official import OFFICIAL
from featdistill.command_line import UserError, one_of
from featdistill.operations import LEVELS, Operation

LIBRARIES: dict[str, dict[str, Operation]] = {"official": OFFICIAL}


@dataclass(frozen=True)
class Step:
    """One operation of a plan.

    Attributes:
        library: the name of the library in `LIBRARIES`.
        name: the operation's name in that library.
        level: 1 to 5.
        seed: seeds the operation's own generator.
    """

    library: str
    name: str
    level: int
    seed: int


Plan = tuple[Step, ...]


@dataclass(frozen=True)
class DistortionPolicy:
    """A distribution over plans. The defaults are those of the organisers' training pipeline.

    Attributes:
        probability: that an image is distorted at all.
        libraries: name -> weight; one library is drawn for each image, in proportion to the weights.
        min_operations: fewest operations of a distorted image.
        max_operations: most operations; every number from the fewest to the most is equally likely.
        level_mean: level L has the weight exp(-(L - level_mean)^2 / (2 level_std^2)).
        level_std: see `level_mean`.
        include: names of the only operations that may be drawn; empty means all.
        exclude: names of operations that are not drawn.
        keeps_layout_only: draw only operations under which every patch keeps its place.

    Raises:
        UserError: a value is out of range, a name is unknown, or nothing is left to draw from.
    """

    probability: float = 1.0
    libraries: Mapping[str, float] = field(default_factory=lambda: {"official": 1.0})
    min_operations: int = 1
    max_operations: int = 3
    level_mean: float = 1.0
    level_std: float = 2.5
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keeps_layout_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "libraries", dict(self.libraries))
        for name in ("include", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise UserError(f"distortion policy: {name} must be a list of names, not '{value}'")
            object.__setattr__(self, name, tuple(value))
        self._check_numbers()
        self._check_names()

    def draw(self, rng: np.random.Generator) -> Plan:
        """Draw a plan: the operations of one library, each of another group, in random order.

        Args:
            rng: the image's generator, see `training_generator` and `evaluation_generator`.

        Returns:
            The steps in the order of their application; empty for an image that is not distorted.
        """
        if rng.random() >= self.probability:
            return ()
        libraries = list(self._groups)
        library = libraries[_weighted(rng, self._library_bounds)]
        groups = self._groups[library]
        count = min(int(rng.integers(self.min_operations, self.max_operations + 1)), len(groups))
        steps = []
        for group in rng.permutation(len(groups))[:count]:
            name = groups[group][rng.integers(len(groups[group]))]
            level = LEVELS[_weighted(rng, self._level_bounds)]
            steps.append(Step(library, name, level, int(rng.integers(2**63))))
        return tuple(steps)

    @cached_property
    def _groups(self) -> dict[str, list[list[str]]]:
        """The operation names that may be drawn, by library and group."""
        allowed = {}
        for library in (name for name, weight in self.libraries.items() if weight > 0):
            groups: dict[str, list[str]] = {}
            for operation in LIBRARIES[library].values():
                if self._allows(operation):
                    groups.setdefault(operation.category, []).append(operation.name)
            allowed[library] = list(groups.values())
        return allowed

    @cached_property
    def _library_bounds(self) -> np.ndarray:
        return _cumulative([self.libraries[name] for name in self._groups])

    @cached_property
    def _level_bounds(self) -> np.ndarray:
        exponents = [(level - self.level_mean) ** 2 / (2 * self.level_std**2) for level in LEVELS]
        return _cumulative([math.exp(min(exponents) - exponent) for exponent in exponents])

    def _allows(self, operation: Operation) -> bool:
        return (
            (not self.include or operation.name in self.include)
            and operation.name not in self.exclude
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
        if not math.isfinite(self.level_mean):
            raise UserError(f"distortion policy: level_mean must be a number, not {self.level_mean}")
        if not (self.level_std > 0 and math.isfinite(self.level_std)):
            raise UserError(f"distortion policy: level_std must be above 0, not {self.level_std}")

    def _check_names(self) -> None:
        for library, weight in self.libraries.items():
            one_of("distortion library", library, LIBRARIES)
            if not (weight >= 0 and math.isfinite(weight)):
                raise UserError(
                    f"distortion policy: the weight of library {library} must be 0 or more, not {weight}"
                )
        if not any(self.libraries.values()):
            raise UserError("distortion policy: at least one library needs a weight above 0")
        known = {name for library in self.libraries for name in LIBRARIES[library]}
        for name in self.include + self.exclude:
            one_of("distortion operation", name, sorted(known))
        for library, groups in self._groups.items():
            if not groups:
                raise UserError(
                    f"distortion policy: no operation of library {library} is left by include, exclude and "
                    "keeps_layout_only; drop one of them or give the library the weight 0"
                )


# "official": the organisers' training pipeline as it was released (1 to 3 operations, levels N(1, 2.5)).
# "released_featdistill": the same, but FeatDistill's released code distorts an image with probability 0.8.
# "moderate": that share, with levels centred on 3 as by team TeleAI-TeleGuard (NTIRE 2026, arXiv 2604.11487).
# "heavy": levels from N(3.5, 1), as team Ant International reports there, in chains of 1 to 5 operations, the
# lengths that the evaluation splits have.
PRESETS: dict[str, DistortionPolicy] = {
    "none": DistortionPolicy(probability=0.0),
    "official": DistortionPolicy(),
    "released_featdistill": DistortionPolicy(probability=0.8),
    "moderate": DistortionPolicy(probability=0.8, level_mean=3.0),
    "heavy": DistortionPolicy(max_operations=5, level_mean=3.5, level_std=1.0),
}


def training_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of one image of a training run: the same for any number of workers and processes.

    Args:
        seed: of the run, 0 or more.
        epoch: counted from 0.
        index: of the image in the data set.
    """
    return np.random.default_rng((seed, epoch, index))


def evaluation_generator(seed: int, name: str) -> np.random.Generator:
    """Return the generator of one image of an evaluation split: the same wherever it stands in the split.

    Args:
        seed: of the split, 0 or more.
        name: what a submission calls the image.
    """
    # SHA-256, because `hash` of a string differs between processes.
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng((seed, int.from_bytes(digest[:16], "little")))


def apply_plan(image: np.ndarray, plan: Plan) -> np.ndarray:
    """Apply a plan's steps in their order.

    Args:
        image: (H, W, 3) uint8 RGB; it is not changed.
        plan: what `DistortionPolicy.draw` returned.

    Returns:
        A new array, or `image` itself for an empty plan.
    """
    for step in plan:
        image = LIBRARIES[step.library][step.name](image, step.level, np.random.default_rng(step.seed))
    return image


def describe(plan: Plan) -> list[list]:
    """Return `[[name, scale], ...]` for the `distortions` column of a manifest.

    The scale is the operation's parameter at the step's level, as in the challenge's label files.
    """
    return [[step.name, LIBRARIES[step.library][step.name].scales[step.level - 1]] for step in plan]


def _cumulative(weights: list[float]) -> np.ndarray:
    total = np.cumsum(weights)
    return total / total[-1]


def _weighted(rng: np.random.Generator, bounds: np.ndarray) -> int:
    """Return the index of the interval of `bounds` (rising to 1) that a uniform draw falls into."""
    return int(np.searchsorted(bounds, rng.random(), side="right"))
