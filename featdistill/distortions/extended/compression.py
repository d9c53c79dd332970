"""Compression of the extended library: codecs as round trips, and what coarse coding leaves behind."""

import math
from functools import cache

import cv2
import numpy as np

from featdistill.distortions.kernels import codecs
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

# Up to where the sinc is summed, in periods of its ringing: the middle of its third side lobe. Its sum up to
# there is that of the whole sinc, so a step rings around its values as it does after an ideal low-pass.
_REACH_PERIODS = 1.75
# Longer periods are filtered at half the resolution, which holds them twice over.
_LONGEST_AT_FULL_SIZE_PX = 6


@register(OPERATIONS, "compression", (10, 25, 50, 90, 160))
def jpeg2000(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """JPEG 2000 at a compression ratio: blur and ringing of wavelets, no blocks.

    The ratio is 3 * H * W divided by the bytes of the file; ARNIQA's go from 16 to 170.
    """
    return codecs.jpeg2000(image, jpeg2000.scales[level - 1])


@register(OPERATIONS, "compression", (75, 45, 20, 8, 0))
def webp(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """WebP of a quality from 0 to 100: predicted blocks, 4:2:0, deblocked.

    75 is the encoder's default, 0 the least that it writes.
    """
    return codecs.webp(image, webp.scales[level - 1])


@register(OPERATIONS, "compression", (256, 160, 96, 64, 40))
def gif(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """GIF with a palette of so many colours, made for the image, and ordered dithering.

    256 is the most that the format holds. Smooth areas become a regular mesh of dots (Bayer, 1973).
    """
    return codecs.gif(image, gif.scales[level - 1])


@register(OPERATIONS, "compression", (3, 4, 5.5, 8, 11))
def ringing(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Gibbs ringing of a period in px: all frequencies above one cycle a period are cut off sharply.

    A codec that drops high coefficients, and a channel or scaler of too small a bandwidth, do that; a step
    then over- and undershoots by about 9 % on both sides, in waves of this period. The sharp low-pass is a
    sinc, as Wang et al. model ringing in "Real-ESRGAN" (2021), there with cut-offs of 2 to 6 px a period;
    here it is separable.
    """
    period_px = ringing.scales[level - 1]
    if period_px <= _LONGEST_AT_FULL_SIZE_PX:
        return _low_pass(image, period_px)
    height, width = image.shape[:2]
    half = cv2.resize(image, (-(-width // 2), -(-height // 2)), interpolation=cv2.INTER_AREA)
    return cv2.resize(_low_pass(half, period_px / 2), (width, height), interpolation=cv2.INTER_CUBIC)


@register(OPERATIONS, "compression", (6, 5, 4, 3, 2))
def color_banding(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """So many bits a channel without dithering, which turns gradients into bands.

    Each sample goes to the nearest of 2^bits values that are spread evenly from 0 to 255, as a display or a
    file of a low bit depth does it.
    """
    return cv2.LUT(image, _fewer_values(color_banding.scales[level - 1]))


def _low_pass(image: np.ndarray, period_px: float) -> np.ndarray:
    taps = _sinc(period_px)
    return cv2.sepFilter2D(image, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)


@cache
def _sinc(period_px: float) -> np.ndarray:
    """Return the taps of the ideal low-pass that ends at one cycle a period, with a sum of 1."""
    reach = _REACH_PERIODS * period_px
    places = np.arange(-math.ceil(reach), math.ceil(reach) + 1)
    # The outermost taps count as much as of them is within reach.
    taps = np.sinc(2 * places / period_px) * np.clip(reach + 0.5 - np.abs(places), 0, 1)
    return taps / taps.sum()


@cache
def _fewer_values(bits: int) -> np.ndarray:
    steps = 2**bits - 1
    return np.rint(np.rint(np.arange(256) * steps / 255) * 255 / steps).astype(np.uint8)
