"""Plans: which operations an image gets, at which levels and with which seeds, as plain data.

A plan can be logged, stored in a manifest, sent to another process, and applied again with the same result.
"""

from dataclasses import dataclass

import numpy as np

from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import MIN_SIDE_PX
from featdistill.images.reading import BrokenImage


@dataclass(frozen=True)
class Step:
    """One operation: its library in `LIBRARIES`, its name, its level (1 to 5), and its generator's seed."""

    library: str
    name: str
    level: int
    seed: int


Plan = tuple[Step, ...]


def apply_plan(image: np.ndarray, plan: Plan) -> np.ndarray:
    """Apply a plan's steps in order to (H, W, 3) uint8 RGB.

    Returns:
        A new array, or `image` itself for an empty plan.

    Raises:
        BrokenImage: the image is too small for the operations.
    """
    if plan and min(image.shape[:2]) < MIN_SIDE_PX:
        height, width = image.shape[:2]
        raise BrokenImage(f"{width} x {height} px are too small to be distorted (at least {MIN_SIDE_PX})")
    for step in plan:
        image = LIBRARIES[step.library][step.name](image, step.level, np.random.default_rng(step.seed))
    return image


def describe(plan: Plan) -> list[list]:
    """Return `[[name, scale], ...]` as in the challenge's label files, for a manifest's `distortions`."""
    return [
        [step.name, LIBRARIES[step.library][step.name].scale(step.level, np.random.default_rng(step.seed))]
        for step in plan
    ]
