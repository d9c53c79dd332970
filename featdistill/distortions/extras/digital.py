"""Digital faults of the extras: dead samples, displaced rows and pixels, and blocks."""

import math

import cv2
import numpy as np

from featdistill.distortions.kernels.noise_tables import random_bytes
from featdistill.distortions.kernels.scratch import in_strips
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

_JPEG_BLOCK_PX = 8
# Bands of a glitch: heights as shares of the image's, most bands there are, and the largest displacements
# of a band, and of its red and blue against green, as shares of the width if all rows were displaced.
_BAND_HEIGHT = (0.01, 0.09)
_MOST_BANDS = 200
_BAND_SHIFT = 0.3
_CHANNEL_SHIFT = 0.05
# How many permutations there are for the blocks of an image to be permuted by.
_PERMUTATIONS = 256


@register(OPERATIONS, "digital", (0.08, 0.17, 0.28, 0.42, 0.6), random=True, keeps_layout=False)
def digital_glitch(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Bands of rows displaced sideways over about this share of the image, each channel by its own distance.

    A decoder or a cable that loses its place in the stream shows the right rows from the wrong place on, up
    to where it finds the next mark. Bands are 1 to 9 % of the height. A band moves by up to 30 % of the width
    times the square root of the share, red and blue by up to 5 % of that width more or less than green, and
    what leaves on one side comes in on the other.
    """
    height, width = image.shape[:2]
    share = digital_glitch.scales[level - 1]
    result = image.copy(order="C")
    for top, bottom, shifts in displaced_bands(height, width, share, rng):
        for channel, shift in enumerate(shifts):
            result[top:bottom, shift:, channel] = image[top:bottom, : width - shift, channel]
            result[top:bottom, :shift, channel] = image[top:bottom, width - shift :, channel]
    return result


@register(OPERATIONS, "digital", (2, 3, 4, 6, 8), random=True)
def pixel_shuffle(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Pixels permuted at random within blocks of so many px.

    Whole pixels change places, so a block keeps its colours and loses their arrangement. Each block has one
    of 256 random permutations. Where the side is no multiple of the block's, the last block overlaps the one
    before it, whose pixels may then move twice. A pixel moves by 7 px at most inside a block and patches do
    not move, hence `keeps_layout`.
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
    """Blocks of 8 x 8 px: each sample moves to its block's mean, by so many steps of 255 at most.

    A coarse quantiser of a step s drops what is below s / 2, and errs by no more: so a block loses the
    variation that is within this distance of its mean, smooth ones become flat, and strong edges keep their
    place and lose a little contrast. It isolates the blocking of jpeg: no ringing, no basis patterns, no
    subsampled colour, an error with a bound, and the three channels of RGB each by itself.
    """
    most = (jpeg_blockiness.scales[level - 1],) * 4
    means = block_means(image, _JPEG_BLOCK_PX)
    cv2.max(means, cv2.subtract(image, most), dst=means)
    return cv2.min(means, cv2.add(image, most), dst=means)


@register(OPERATIONS, "digital", (0.004, 0.012, 0.03, 0.06, 0.12), random=True)
def salt_and_pepper(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """This share of all pixels become black or white, as likely one as the other.

    Every pixel by itself with this probability, all three channels together: sites of a sensor that are stuck
    or errors in transmission. The pixels of a level are those of the lower ones and more.
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
    """Squares of so many px, each in its mean colour; what remains at the right and below is smaller."""
    return block_means(image, pixelate.scales[level - 1])


def block_means(image: np.ndarray, side: int) -> np.ndarray:
    """Replace every block by its mean.

    Args:
        image: (H, W, 3) uint8.
        side: of the blocks in px; those at the right and lower edges are what remains.

    Returns:
        (H, W, 3) uint8, a new array.
    """
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
    """Draw the bands of a glitch.

    Args:
        height: of the image.
        width: of the image.
        share: of the rows that the bands cover, at least; the last band may cover more.
        rng: what places, heights and displacements are drawn from. The bands of a share are those of a
            smaller one and more, though displaced farther.

    Returns:
        (first row, row after the last, displacement to the right of each channel in px from 0 to W - 1).
    """
    bands, covered = [], np.zeros(height, bool)
    reach_px = math.sqrt(share) * width
    for _ in range(_MOST_BANDS):
        if covered.mean() >= share:
            break
        rows = max(1, round(height * rng.uniform(*_BAND_HEIGHT)))
        top = int(rng.integers(height - rows + 1))
        way, apart = rng.uniform(-1, 1), rng.uniform(0.3, 1) * (1 if rng.random() < 0.5 else -1)
        shift = way * _BAND_SHIFT * reach_px
        step = math.copysign(max(1.0, abs(apart) * _CHANNEL_SHIFT * reach_px), apart)
        bands.append((top, top + rows, [round(shift + place * step) % width for place in (1, 0, -1)]))
        covered[top : top + rows] = True
    return bands


def _parts(length: int, side: int) -> list[slice]:
    """Split a length into what holds whole blocks and what remains, where there is something."""
    whole = length // side * side
    return [part for part in (slice(0, whole), slice(whole, length)) if part.start < part.stop]


def _permute_blocks(pixels: np.ndarray, side: int, orders: np.ndarray, rng: np.random.Generator) -> None:
    """Permute, in place, the pixels of every block.

    Args:
        pixels: (rows * side, columns * side) int32, part of a larger array.
        side: of the blocks.
        orders: (256, side * side) permutations of a block's places, of which each block draws one.
    """
    height, width = pixels.shape
    rows, columns = height // side, width // side
    which = random_bytes(rng, rows * columns).reshape(rows, columns)
    source = pixels.flatten()
    down, across = np.divmod(orders, side)
    offsets = (down * width + across).astype(np.int64).reshape(len(orders), side, side)
    first = side * (width * np.arange(rows)[:, None] + np.arange(columns))
    for row in range(side):
        places = np.take(offsets[:, row], which, axis=0)
        places += first[..., None]
        pixels[row::side] = np.take(source, places).reshape(rows, width)
