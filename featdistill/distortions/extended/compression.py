"""Compression of the extended library: codecs as round trips, and artifacts of coarse coding."""

import math
from functools import cache

import cv2
import numpy as np

from featdistill.distortions.kernels import codecs
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

# The sinc is summed up to the middle of its third side lobe, in periods of its ringing. The sum up to there
# equals that of the whole sinc, so a step rings around its values as it does after an ideal low-pass.
_REACH_PERIODS = 1.75
# Longer periods are filtered at half the resolution, which is still twice as fine as they need.
_LONGEST_AT_FULL_SIZE_PX = 6


@register(OPERATIONS, "compression", (14, 25, 50, 90, 160))
def jpeg2000(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """JPEG 2000: blur and ringing of wavelets, no blocks; scale: compression ratio.

    The ratio is 3 * H * W divided by the bytes of the file; ARNIQA's are 16 to 170.
    """
    return codecs.jpeg2000(image, jpeg2000.scales[level - 1])


@register(OPERATIONS, "compression", (75, 45, 20, 8, 0))
def webp(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """WebP: predicted blocks, 4:2:0, deblocked; scale: quality from 0 to 100.

    75 is the encoder's default, 0 the lowest quality that it writes.
    """
    return codecs.webp(image, webp.scales[level - 1])


@register(OPERATIONS, "compression", (256, 160, 96, 64, 40))
def gif(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """GIF with a palette made for the image and ordered dithering; scale: number of colors.

    256 is the format's maximum. Smooth areas become a regular mesh of dots (Bayer, 1973).
    """
    return codecs.gif(image, gif.scales[level - 1])


@register(OPERATIONS, "compression", (3.4, 4.2, 5.5, 8, 11))
def ringing(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Gibbs ringing: a sharp cut-off of all higher frequencies; scale: period of the ringing in px.

    As of a codec that drops high coefficients, or a channel or scaler with too small a bandwidth: a step
    over- and undershoots by about 9 % on both sides, in waves of this period. The sharp low-pass is a sinc,
    as in Wang et al., "Real-ESRGAN" (2021), who cut off at periods of 2 to 6 px; here it is separable.
    """
    period_px = ringing.scales[level - 1]
    if period_px <= _LONGEST_AT_FULL_SIZE_PX:
        return _low_pass(image, period_px)
    height, width = image.shape[:2]
    half = cv2.resize(image, (-(-width // 2), -(-height // 2)), interpolation=cv2.INTER_AREA)
    return cv2.resize(_low_pass(half, period_px / 2), (width, height), interpolation=cv2.INTER_CUBIC)


@register(OPERATIONS, "compression", (24, 16, 11, 7, 5))
def color_banding(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Fewer values per channel without dithering, which turns gradients into bands; scale: their number.

    Each sample is rounded to the nearest of these values, which are spread evenly from 0 to 255.
    """
    return cv2.LUT(image, _fewer_values(color_banding.scales[level - 1]))


def _low_pass(image: np.ndarray, period_px: float) -> np.ndarray:
    taps = _sinc(period_px)
    return cv2.sepFilter2D(image, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)


@cache
def _sinc(period_px: float) -> np.ndarray:
    """Return the taps of the ideal low-pass that ends at one cycle per period, with a sum of 1."""
    reach = _REACH_PERIODS * period_px
    positions = np.arange(-math.ceil(reach), math.ceil(reach) + 1)
    # The outermost taps count only as far as they are within reach.
    taps = np.sinc(2 * positions / period_px) * np.clip(reach + 0.5 - np.abs(positions), 0, 1)
    return taps / taps.sum()


@cache
def _fewer_values(number: int) -> np.ndarray:
    steps = number - 1
    return np.rint(np.rint(np.arange(256) * steps / 255) * 255 / steps).astype(np.uint8)
