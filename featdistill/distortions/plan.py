"""Plans: which operations an image gets, at which levels and with which seeds, as plain data.

A plan can be logged, stored in a manifest, sent to another process, and applied again with the same result.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np

from featdistill.distortions.kernels.noise_tables import random_bytes
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import MIN_SIDE_PX, Operation
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
    return apply_chain(
        image,
        ((LIBRARIES[step.library][step.name], step.level, np.random.default_rng(step.seed)) for step in plan),
    )


def apply_chain(image: np.ndarray, chain: Iterable[tuple[Operation, int, np.random.Generator]]) -> np.ndarray:
    """Apply operations at levels in order.

    The organizers' chain keeps floats, and its JPEG cuts off their fractions. Here every result is rounded,
    so before an operation that truncates, a random half of the samples is lowered by 1.
    """
    has_fractions = False
    for operation, level, rng in chain:
        if has_fractions and operation.truncates:
            image = _truncated(image, rng)
        result = operation(image, level, rng)
        has_fractions = has_fractions or (operation.leaves_fractions and not np.array_equal(result, image))
        image = result
    return image


def _truncated(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Subtract a random bit from every sample but those clipped at 0 and 255."""
    bits = (random_bytes(rng, image.size) & 1).reshape(image.shape)
    bits[image == 255] = 0
    return cv2.subtract(image, bits)


def describe(plan: Plan) -> list[list]:
    """Return `[[name, scale], ...]` as in the challenge's label files, for a manifest's `distortions`."""
    return [
        [step.name, LIBRARIES[step.library][step.name].scale(step.level, np.random.default_rng(step.seed))]
        for step in plan
    ]
