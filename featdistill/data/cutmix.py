"""CutMix: a box of an image shows another image, and the label is mixed in proportion to the areas.

Yun et al. 2019, "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
section 3.1 and the authors' code.
"""

from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """The rows from `top` to `bottom` and the columns from `left` to `right`, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int

    def share(self, size: int) -> float:
        """Return its share of the area of a square of `size` px."""
        return (self.bottom - self.top) * (self.right - self.left) / size**2


def draw_box(size: int, alpha: float, rng: np.random.Generator) -> Box:
    """Draw a square box in a square of `size` px, cut off at its borders.

    Its area is 1 - lambda of the square's, lambda ~ Beta(alpha, alpha), before it is cut off; its center is
    uniform.
    """
    half = int(size * np.sqrt(1 - rng.beta(alpha, alpha))) // 2
    middle = rng.integers(size, size=2)
    (top, left), (bottom, right) = np.clip([middle - half, middle + half], 0, size).tolist()
    return Box(top, left, bottom, right)


def paste(square: np.ndarray, other: np.ndarray, box: Box) -> np.ndarray:
    """Return a copy of a square (S, S, 3) with a box of another one in the same place."""
    rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
    mixed = square.copy()
    mixed[rows, columns] = other[rows, columns]
    return mixed
