"""Digital faults of the extras: dead samples, displaced rows and pixels, and blocks."""

import math

import cv2
import numpy as np

from featdistill.distortions.kernels.noise_tables import random_bytes
from featdistill.distortions.kernels.scratch import in_strips
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

_JPEG_BLOCK_PX = 8
# Bands of a glitch: heights as shares of the image's, largest number, and largest displacements of a band,
# and of its red and blue against green, as shares of the width if all rows were displaced.
_BAND_HEIGHT = (0.01, 0.09)
_MAX_BANDS = 200
_BAND_SHIFT = 0.3
_CHANNEL_SHIFT = 0.05
# Number of permutations from which the blocks of an image draw theirs.
_PERMUTATIONS = 256


@register(OPERATIONS, "digital", (0.08, 0.17, 0.28, 0.42, 0.6), random=True, keeps_layout=False)
def digital_glitch(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Bands of rows displaced sideways, each channel differently; scale: displaced share of the rows.

    Like a decoder or a cable that loses synchronization until the next marker. Bands are 1 to 9 % of the
    height. A band moves by up to 30 % of the width times the square root of the scale, red and blue by up to
    5 % of that width more or less than green, and wraps around.
    """
    height, width = image.shape[:2]
    share = digital_glitch.scales[level - 1]
    result = image.copy(order="C")
    for top, bottom, shifts in displaced_bands(height, width, share, rng):
        for channel, shift in enumerate(shifts):
            result[top:bottom, shift:, channel] = image[top:bottom, : width - shift, channel]
            result[top:bottom, :shift, channel] = image[top:bottom, width - shift :, channel]
    return result


@register(OPERATIONS, "digital", (2, 3, 4, 6, 8), random=True, keeps_layout=False)
def pixel_shuffle(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Pixels permuted at random within blocks; scale: side of a block in px.

    A block keeps its colors and loses their arrangement. Each block has one of 256 random permutations. Where
    the block's side does not divide the image's, the last block overlaps the one before it, whose pixels may
    move twice.
    """
    side = pixel_shuffle.scales[level - 1]
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA).view(np.int32)[..., 0]
    orders = rng.permuted(np.tile(np.arange(side**2), (_PERMUTATIONS, 1)), axis=1)
    height, width = pixels.shape
    whole_rows, whole_columns = height // side * side, width // side * side
    _permute_blocks(pixels[:whole_rows, :whole_columns], side, orders, rng)
    if whole_columns < width:
        _permute_blocks(pixels[:whole_rows, width - side :], side, orders, rng)
    if whole_rows < height:
        _permute_blocks(pixels[height - side :, :whole_columns], side, orders, rng)
        _permute_blocks(pixels[height - side :, width - side :], side, orders, rng)
    return cv2.cvtColor(pixels[..., None].view(np.uint8), cv2.COLOR_RGBA2RGB)


@register(OPERATIONS, "digital", (3, 6, 10, 15, 22))
def jpeg_blockiness(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Samples moved towards the mean of their block of 8 x 8 px; scale: largest change (0-255).

    A coarse quantizer of a step s drops what is below s / 2 and errs by no more: a block loses the variation
    within this distance of its mean, so smooth blocks become flat and strong edges lose a little contrast.
    This isolates the blocking of JPEG: no ringing, no basis patterns, no subsampled color, a bounded error.
    """
    limit = (jpeg_blockiness.scales[level - 1],) * 4
    means = block_means(image, _JPEG_BLOCK_PX)
    cv2.max(means, cv2.subtract(image, limit), dst=means)
    return cv2.min(means, cv2.add(image, limit), dst=means)


@register(OPERATIONS, "digital", (0.004, 0.012, 0.03, 0.06, 0.12), random=True)
def salt_and_pepper(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Pixels turned black or white, with equal probability; scale: their share.

    All channels together, like stuck photosites. A level has the pixels of the lower ones, and more.
    """
    half = round(salt_and_pepper.scales[level - 1] * 2**15)

    def struck(strip: np.ndarray) -> np.ndarray:
        rows, columns = strip.shape[:2]
        draws = random_bytes(rng, 2 * rows * columns).view(np.uint16).reshape(rows, columns)
        salt = cv2.cvtColor(cv2.inRange(draws, 0, half - 1), cv2.COLOR_GRAY2RGB)
        not_pepper = cv2.cvtColor(cv2.inRange(draws, 0, 2**16 - 1 - half), cv2.COLOR_GRAY2RGB)
        return cv2.min(cv2.max(strip, salt), not_pepper)

    return in_strips(struck, image)


@register(OPERATIONS, "digital", (2, 3, 5, 7, 10))
def pixelate(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Squares in their mean color, smaller at the right and lower edges; scale: side in px."""
    return block_means(image, pixelate.scales[level - 1])


def block_means(image: np.ndarray, side: int) -> np.ndarray:
    """Replace every block of (H, W, 3) uint8 by its mean; blocks at the right and bottom may be smaller."""
    height, width = image.shape[:2]
    result = np.empty_like(image, order="C")
    for rows in _parts(height, side):
        for columns in _parts(width, side):
            region = image[rows, columns]
            size = region.shape[1::-1]
            blocks = (-(-size[0] // side), -(-size[1] // side))
            small = cv2.resize(region, blocks, interpolation=cv2.INTER_AREA)
            result[rows, columns] = cv2.resize(small, size, interpolation=cv2.INTER_NEAREST)
    return result


def displaced_bands(
    height: int, width: int, share: float, rng: np.random.Generator
) -> list[tuple[int, int, list[int]]]:
    """Draw the bands of a glitch, which cover at least this share of the rows.

    A larger share has the bands of a smaller one, displaced farther, and more. A band is (first row, row
    after the last, displacement to the right of each channel in px from 0 to W - 1).
    """
    bands, covered = [], np.zeros(height, bool)
    reach_px = math.sqrt(share) * width
    for _ in range(_MAX_BANDS):
        if covered.mean() >= share:
            break
        rows = max(1, round(height * rng.uniform(*_BAND_HEIGHT)))
        top = int(rng.integers(height - rows + 1))
        direction, apart = rng.uniform(-1, 1), rng.uniform(0.3, 1) * (1 if rng.random() < 0.5 else -1)
        shift = direction * _BAND_SHIFT * reach_px
        step = math.copysign(max(1.0, abs(apart) * _CHANNEL_SHIFT * reach_px), apart)
        bands.append((top, top + rows, [round(shift + steps * step) % width for steps in (1, 0, -1)]))
        covered[top : top + rows] = True
    return bands


def _parts(length: int, side: int) -> list[slice]:
    """Split a length into the whole blocks and, if there is one, the remainder."""
    whole = length // side * side
    return [part for part in (slice(0, whole), slice(whole, length)) if part.start < part.stop]


def _permute_blocks(pixels: np.ndarray, side: int, orders: np.ndarray, rng: np.random.Generator) -> None:
    """Permute, in place, the pixels of every block by one of `orders`, (256, side * side) permutations.

    `pixels` is (rows * side, columns * side) int32, part of a larger array.
    """
    height, width = pixels.shape
    rows, columns = height // side, width // side
    which = random_bytes(rng, rows * columns).reshape(rows, columns)
    source = pixels.flatten()
    down, across = np.divmod(orders, side)
    offsets = (down * width + across).astype(np.int64).reshape(len(orders), side, side)
    first = side * (width * np.arange(rows)[:, None] + np.arange(columns))
    for row in range(side):
        indices = np.take(offsets[:, row], which, axis=0)
        indices += first[..., None]
        pixels[row::side] = np.take(source, indices).reshape(rows, width)
