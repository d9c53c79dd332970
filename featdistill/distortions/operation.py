"""What a distortion operation is, and how it is registered in a library.

An operation is `op(image, level, rng) -> image`: it takes an (H, W, 3) uint8 RGB image of at least 16 px per
side and a level from 1 to 5, and returns a new array of the same shape (unless `keeps_size=False`) and type.
It never changes its input and draws every random choice from `rng`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

LEVELS = (1, 2, 3, 4, 5)
MIN_SIDE_PX = 16


@dataclass(frozen=True)
class Operation:
    """A registered operation: calling it checks the input, then applies it.

    Attributes:
        name: used in recipes, manifests and label files.
        category: its group; a composition uses each group at most once.
        scales: the parameter at level 1 .. 5; the operation's docstring says what it means.
        keeps_layout: every patch stays in place and can be seen (needed where tokens of two views are
            compared).
        keeps_size: height and width do not change.
        random: the result depends on the generator.
        monotone: a higher level changes the image more (or leaves less of it, where the size changes).
        spread: the parameter is drawn uniformly within this distance of the level's scale, and rounded where
            the scale is an integer.
        leaves_fractions: in floats, its result is not whole 8-bit values where its input is.
        truncates: in floats, it cuts off the fractions of its input instead of rounding.
        missing: returns what must be installed to apply it, or an empty string.
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
    leaves_fractions: bool = True
    truncates: bool = False
    missing: Callable[[], str] = field(default=str, repr=False)

    def scale(self, level: int, rng: np.random.Generator) -> float:
        """Return the parameter at a level, drawn from `rng` if the operation has a `spread`.

        An operation calls this before it draws anything else, so a step's parameter follows from its seed.
        """
        nominal = self.scales[level - 1]
        if not self.spread:
            return nominal
        drawn = nominal + self.spread * rng.uniform(-1, 1)
        return round(drawn) if isinstance(nominal, int) else round(drawn, 3)

    def __call__(self, image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
        """Apply the operation.

        Raises:
            ValueError: the image is not (H, W, 3) uint8 of at least 16 px per side, or the level not 1 .. 5.
        """
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            raise ValueError(
                f"{self.name}: the image must be a uint8 array, not {getattr(image, 'dtype', type(image))}"
            )
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{self.name}: the image must have shape (H, W, 3), not {image.shape}")
        if min(image.shape[:2]) < MIN_SIDE_PX:
            raise ValueError(f"{self.name}: the image must be {MIN_SIDE_PX} px or more, not {image.shape}")
        if level not in LEVELS:
            raise ValueError(f"{self.name}: the level must be 1 to 5, not {level}")
        return self.apply(image, level, rng)


def register(registry: dict[str, Operation], category: str, scales: tuple, **traits) -> Callable:
    """Return a decorator that adds a function to a library under its own name.

    The decorated name becomes the `Operation`, so a direct call is checked as well.
    """

    def add(function: Callable) -> Operation:
        operation = Operation(function.__name__, category, function, scales, **traits)
        registry[operation.name] = operation
        return operation

    return add
