"""Occlusion of the extended library: things in front of the scene, opaque or refracting."""

import math
from functools import cache

import cv2
import numpy as np

from featdistill.distortions.kernels.noise_tables import random_bytes
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

KINDS = ("rectangle", "disc", "strip")
FILLS = ("noise", "mean", "black")
_MAX_SHAPES = 30
_LONGEST_TO_SHORTEST = 2.5

# Radii of drops as shares of the square root of the image's area, and number of attempts to place one.
_DROP_RADIUS = (0.06, 0.16)
_SMALLEST_DROP_PX = 3
_DROP_ATTEMPTS = 200
_PROTOTYPE_PX = 128
# A drop is a spherical cap of water on glass: refractive index, radius of the sphere in radii of the drop
# (it meets the glass at asin(1 / 1.15) = 60 degrees), and distance of the scene behind, in radii of the drop.
_REFRACTIVE_INDEX = 1.33
_SPHERE_RADIUS = 1.15
_SCENE_DISTANCE = 10.6


@register(OPERATIONS, "occlusion", (0.03, 0.08, 0.15, 0.25, 0.4), random=True, keeps_layout=False)
def random_occlusion(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Opaque rectangles, discs and strips from edge to edge; scale: covered share of the image.

    Each shape's kind, position, proportions and filling (noise, the image's mean color or black) are random.
    A shape has 15 to 45 % of the area to be covered, so there are about four; they may overlap.
    """
    height, width = image.shape[:2]
    target = random_occlusion.scales[level - 1] * height * width
    mean = np.rint(cv2.mean(image)[:3]).astype(np.uint8)
    grain = np.random.default_rng(rng.integers(2**63))
    result, covered = image.copy(order="C"), np.zeros((height, width), np.uint8)
    for _ in range(_MAX_SHAPES):
        left = target - cv2.countNonZero(covered)
        if left < 0.05 * target:
            break
        # Every shape draws equally often, so a seed has similar shapes at all levels.
        kind, fill = KINDS[rng.integers(len(KINDS))], FILLS[rng.integers(len(FILLS))]
        area = min(left, rng.uniform(0.15, 0.45) * target)
        box, shape = _draw_shape(kind, area, (height, width), rng.random(3))
        patch = np.zeros((*shape.shape, 3), np.uint8)
        if fill == "noise":
            patch = random_bytes(grain, patch.size).reshape(patch.shape)
        elif fill == "mean":
            patch[...] = mean
        result[box] = cv2.copyTo(patch, shape, result[box].copy())
        covered[box] |= shape
    return result


@register(OPERATIONS, "occlusion", (0.03, 0.07, 0.13, 0.2, 0.3), random=True, keeps_layout=False)
def water_drops(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Water drops on a pane, which show the scene upside down; scale: covered share of the image.

    A drop is a spherical cap: it bends the line of sight by (n - 1) * slope towards its other side. This
    makes an inverted wide view, half as large in the middle of the drop and smaller at its rim, which is dark
    because of reflection; a light from above glints on it. Positions are random, radii 6 to 16 % of the
    square root of the image's area. A level has the drops of the one below, except the last, and more.
    """
    height, width = image.shape[:2]
    # Drops show the scene at half its size or less, so half the resolution is enough, and avoids aliasing.
    even = image[: height // 2 * 2, : width // 2 * 2]
    half = cv2.resize(even, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    result = image.copy(order="C")
    for left, top, side in draw_drops((height, width), water_drops.scales[level - 1], rng):
        offset, inwards, gain, glint = (cv2.resize(part, (side, side)) for part in _drop_parts())
        # Pixel i of the image is pixel i / 2 - 1/4 of the half, where a radius is a quarter of the side.
        offset *= side / 4
        source = cv2.add(offset, (left / 2 + side / 4 - 0.5, top / 2 + side / 4 - 0.5, 0.0, 0.0), dst=offset)
        view = cv2.remap(half, source, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        view = cv2.add(_times(view, gain), cv2.merge([glint, glint, glint]))
        # How much of a pixel the drop covers: half of it on the rim.
        cover = cv2.addWeighted(inwards, 255 * side / 2, inwards, 0, 127.5, dtype=cv2.CV_8U)
        box = result[top : top + side, left : left + side]
        box[...] = cv2.add(_times(view, cover), _times(box, cv2.bitwise_not(cover)))
    return result


def draw_drops(size: tuple[int, int], share: float, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Draw drops that do not touch inside an image of (height, width): (left, top, side) of their squares.

    The last drop completes the share of the image's area; the share does not change what is drawn from `rng`.
    """
    height, width = size
    smallest, largest = (2 * limit * math.sqrt(height * width) for limit in _DROP_RADIUS)
    smallest = max(smallest, _SMALLEST_DROP_PX + 1)
    left = share * height * width
    drops: list[tuple[float, float, float]] = []
    squares = []
    for across, down, portion in rng.random((_DROP_ATTEMPTS, 3)).tolist():
        x, y = across * width, down * height
        free = 2 * min(x, y, width - x, height - y)
        for other_x, other_y, other_side in drops:
            free = min(free, 2 * math.hypot(x - other_x, y - other_y) - other_side - 2)
        side = min(smallest + portion * (largest - smallest), free - 1)
        # A drop that would leave less than the smallest takes the rest as well.
        is_last = left - _disc(side) < _disc(smallest)
        side = round(2 * math.sqrt(left / math.pi) if is_last else side)
        side = max(side, _SMALLEST_DROP_PX)
        if free < smallest or side > free - 1:
            continue
        corner_x, corner_y = round(x - side / 2), round(y - side / 2)
        squares.append((corner_x, corner_y, side))
        drops.append((corner_x + side / 2, corner_y + side / 2, side))
        if is_last:
            break
        left -= _disc(side)
    return squares


def _disc(diameter: float) -> float:
    return math.pi / 4 * diameter**2


@cache
def _drop_parts() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the parts of a drop, in its square.

    Returns:
        The offset from its middle to what is seen, in its radii, (S, S, 2) float32; the distance from its rim
        inwards, likewise, (S, S); and its transmission and glint (0-255), (S, S) uint8 each.
    """
    axis = (np.arange(_PROTOTYPE_PX) + 0.5) * 2 / _PROTOTYPE_PX - 1
    across, down = np.meshgrid(axis, axis)
    distance_2 = across**2 + down**2
    # The slope of the cap at a distance d from its axis is d / sqrt(R^2 - d^2), R the radius of the sphere,
    # and the line of sight meets the scene (n - 1) * slope * scene distance further on the other side.
    bend = (_REFRACTIVE_INDEX - 1) * _SCENE_DISTANCE
    factor = 1 - bend / np.sqrt(_SPHERE_RADIUS**2 - np.minimum(distance_2, 1))
    offset = (factor[..., None] * np.dstack([across, down])).astype(np.float32)
    inwards = (1 - np.sqrt(distance_2)).astype(np.float32)
    # The bottom of the drop shows the sky, and the rim reflects.
    gain = np.clip(0.9 + 0.1 * down - 0.5 * distance_2**4, 0, 1)
    glint = 0.9 * np.exp(-((across + 0.35) ** 2) / 0.02 - (down + 0.5) ** 2 / 0.01)
    gain, glint = (np.rint(255 * part).astype(np.uint8) for part in (gain, glint))
    return offset, inwards, gain, glint


def _times(image: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Multiply (H, W, 3) uint8 by (H, W) uint8 / 255."""
    return cv2.multiply(image, cv2.merge([factor, factor, factor]), scale=1 / 255)


def _draw_shape(
    kind: str, area: float, size: tuple[int, int], uniforms: np.ndarray
) -> tuple[tuple[slice, slice], np.ndarray]:
    """Return the box of a shape inside an image of (height, width), and the shape in it, 255 and 0.

    A disc or strip that would not fit, or would be thinner than a pixel, becomes a rectangle.
    """
    height, width = size
    lengthwise = uniforms[2] < 0.5
    length = width if lengthwise else height
    diameter = 2 * math.sqrt(area / math.pi)
    is_disc = kind == "disc" and diameter <= min(height, width)
    if is_disc:
        rows = columns = math.ceil(diameter)
    elif kind == "strip" and area >= length:
        rows, columns = (round(area / width), width) if lengthwise else (height, round(area / height))
    else:
        columns = math.sqrt(area) * _LONGEST_TO_SHORTEST ** (uniforms[2] - 0.5)
        columns = min(width, max(1, round(columns), math.ceil(area / height)))
        rows = min(height, max(1, round(area / columns)))
    top, left = int(uniforms[0] * (height - rows + 1)), int(uniforms[1] * (width - columns + 1))
    shape = np.full((rows, columns), 255, np.uint8)
    if is_disc:
        squared = (np.arange(rows) - (rows - 1) / 2) ** 2
        shape[squared[:, None] + squared > (diameter / 2) ** 2] = 0
    return (slice(top, top + rows), slice(left, left + columns)), shape
