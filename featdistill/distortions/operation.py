"""What a distortion operation is, and how a library of them is registered.

An operation is `op(image, level, rng) -> image`: (H, W, 3) uint8 RGB in, a new array of the same shape and
type out (unless it says `keeps_size=False`), level 1 to 5, every random choice from the generator given,
input never changed, any size from 16 px.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

LEVELS = (1, 2, 3, 4, 5)
MIN_SIDE_PX = 16


@dataclass(frozen=True)
class Operation:
    """One registered operation.

    Calling it checks the contract's inputs and applies it.

    Attributes:
        name: what recipes, manifests and label files call it.
        category: the group it belongs to; a composition takes each group at most once.
        scales: the parameter at level 1 .. 5, in the unit that the operation's docstring gives.
        keeps_layout: every patch keeps its place (needed where tokens of two views are compared).
        keeps_size: height and width stay.
        random: the result depends on the generator.
        monotone: a higher level changes the image more (where the size changes: leaves less of it).
        spread: the parameter is drawn uniformly within this distance of the level's scale (and rounded, where
            the scale is a whole number).
        missing: returns what must be installed before it can be applied, or an empty text.
    """

    name: str
    category: str
    apply: Callable[[np.ndarray, int, np.random.Generator], np.ndarray] = field(repr=False)
    scales: tuple[float, float, float, float, float]
    keeps_layout: bool = True
    keeps_size: bool = True
    random: bool = False
    monotone: bool = True
    spread: float = 0.0
    missing: Callable[[], str] = field(default=str, repr=False)

    def scale(self, level: int, rng: np.random.Generator) -> float:
        """Return the parameter at a level: of the table, or, with a `spread`, drawn first of all from `rng`.

        An operation calls this before it draws anything else, so that a plan can tell the parameter from the
        seed of a step alone.
        """
        nominal = self.scales[level - 1]
        if not self.spread:
            return nominal
        drawn = nominal + self.spread * rng.uniform(-1, 1)
        return round(drawn) if isinstance(nominal, int) else round(drawn, 3)

    def __call__(self, image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
        """Apply the operation.

        Raises:
            ValueError: the image is not (H, W, 3) uint8 of at least 16 px a side, or the level is not 1 .. 5.
        """
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            raise ValueError(
                f"{self.name}: the image must be a uint8 array, not {getattr(image, 'dtype', type(image))}"
            )
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{self.name}: the image must have shape (H, W, 3), not {image.shape}")
        if min(image.shape[:2]) < MIN_SIDE_PX:
            raise ValueError(
                f"{self.name}: the image must measure at least {MIN_SIDE_PX} px a side, not {image.shape}"
            )
        if level not in LEVELS:
            raise ValueError(f"{self.name}: the level must be 1 to 5, not {level}")
        return self.apply(image, level, rng)


def register(registry: dict[str, Operation], category: str, scales: tuple, **traits) -> Callable:
    """Return a decorator that enters a function under its own name into a library.

    The decorated name becomes the `Operation`, so that a direct call is checked as well.
    """

    def enter(function: Callable) -> Operation:
        operation = Operation(function.__name__, category, function, scales, **traits)
        registry[operation.name] = operation
        return operation

    return enter
