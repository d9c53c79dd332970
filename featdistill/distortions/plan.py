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


def apply_plan(image: np.ndarray, plan: Plan) -> np.ndarray:
    """Apply a plan's steps in their order.

    Args:
        image: (H, W, 3) uint8 RGB; it is not changed.
        plan: what `DistortionPolicy.draw` returned.

    Returns:
        A new array, or `image` itself for an empty plan.

    Raises:
        BrokenImage: the image is smaller than the operations take.
    """
    if plan and min(image.shape[:2]) < MIN_SIDE_PX:
        height, width = image.shape[:2]
        raise BrokenImage(f"{width} x {height} px are too small to be distorted (at least {MIN_SIDE_PX})")
    for step in plan:
        image = LIBRARIES[step.library][step.name](image, step.level, np.random.default_rng(step.seed))
    return image


def describe(plan: Plan) -> list[list]:
    """Return `[[name, scale], ...]` for the `distortions` column of a manifest.

    The scale is the operation's parameter in this step, as in the challenge's label files.
    """
    return [
        [
            step.name,
            LIBRARIES[step.library][step.name].scale(step.level, np.random.default_rng(step.seed)),
        ]
        for step in plan
    ]
