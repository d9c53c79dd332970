"""Sensor and lens of the extended library: overflowing charge, and light that falls off to the corners."""

import math

import cv2
import numpy as np

from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

# A pixel is saturated from this luminance on, or where fewer are, if it is among the brightest 1 %.
_SATURATED = 250
_BRIGHTEST_SHARE = 0.01
# Spilt charge is smooth: it is computed for blocks of rows, this many per height, and interpolated.
_BLOCKS = 64
# As shares of the image's height: the length over which the overflow falls to 1 / e, and sigma of the glow.
_OVERFLOW_LENGTH = 0.08
_GLOW_SIGMA = 0.04
_GLOW_SHARE = 0.15

_GAMMA = 2.2


@register(OPERATIONS, "sensor", (0.7, 1.25, 2.2, 4, 7))
def blooming(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Blooming: saturated photosites spill charge; scale: their excess in full wells.

    85 % of the excess runs up and down the sensor's column and decays exponentially over 8 % of the height;
    the rest glows around. It is added as light, here the square of the values, up to the full well, and is
    white, because a column has photosites of all colors. Where fewer than 1 % of the pixels are saturated,
    the brightest 1 % count as such and spill light of their mean color, which is the full well then.
    """
    luminance = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    threshold = _saturation(luminance)
    saturated = cv2.compare(luminance, threshold, cv2.CMP_GE)
    full_well = (255.0,) * 3 if threshold >= _SATURATED else cv2.mean(image, saturated)[:3]
    spilt = blooming.scales[level - 1] * spilt_charge(saturated)
    spilt = cv2.resize(spilt, luminance.shape[::-1], interpolation=cv2.INTER_LINEAR)
    light = cv2.LUT(image, np.arange(256, dtype=np.float32) ** 2)
    cv2.add(light, cv2.merge([np.float32(maximum**2) * spilt for maximum in full_well]), dst=light)
    bloomed = cv2.convertScaleAbs(np.sqrt(light, out=light))
    # Samples above the full well do not change.
    return cv2.max(cv2.min(bloomed, (*full_well, 0.0)), image)


@register(OPERATIONS, "sensor", (0.25, 0.4, 0.55, 0.7, 0.85), random=True)
def vignetting(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Natural vignetting, cos^4 of the light's angle; scale: share lost in the farthest corner.

    The optical axis meets the image at random within a tenth of the sides around its middle, as in a crop.
    Values are light to the power of 1 / 2.2.
    """
    height, width = image.shape[:2]
    axis_y, axis_x = (np.array([height, width]) - 1) / 2 + rng.uniform(-0.1, 0.1, 2) * (height, width)
    farthest = math.hypot(max(axis_x, width - 1 - axis_x), max(axis_y, height - 1 - axis_y))
    # cos^4 of an angle whose tangent is t is (1 + t^2)^-2.
    tangent_2 = (1 - vignetting.scales[level - 1]) ** -0.5 - 1
    # The law is smooth, so it is computed per cell and interpolated, with one more cell beyond each edge.
    cell_px = min(8, min(height, width) // 16)
    cells_y, cells_x = -(-height // cell_px) + 2, -(-width // cell_px) + 2
    y = (np.arange(cells_y) - 0.5) * cell_px - 0.5
    x = (np.arange(cells_x) - 0.5) * cell_px - 0.5
    distance_2 = ((y - axis_y) ** 2)[:, None] + (x - axis_x) ** 2
    gain = ((1 + tangent_2 * distance_2 / farthest**2) ** (-2 / _GAMMA)).astype(np.float32)
    gain = cv2.resize(gain, (cells_x * cell_px, cells_y * cell_px))[cell_px:, cell_px:][:height, :width]
    return cv2.multiply(image, cv2.merge([gain, gain, gain]), dtype=cv2.CV_8U)


def spilt_charge(saturated: np.ndarray) -> np.ndarray:
    """Return what saturated pixels, (H, W) uint8 of 255 and 0, spill if each has an excess of one full well.

    The (rows, W) float32 are in full wells, for blocks of rows. They are 1 in a large saturated area and
    about 1/2 just above and below.
    """
    height, width = saturated.shape
    block_px = max(1, height // _BLOCKS)
    rows = -(-height // block_px)
    share = np.zeros((rows * block_px, width), np.uint8)
    np.bitwise_and(saturated, 1, out=share[:height])
    share = np.add.reduce(share.reshape(rows, block_px, width), axis=1, dtype=np.uint16)
    share = share / np.float32(block_px)

    decay = math.exp(-block_px / (_OVERFLOW_LENGTH * height))
    reach = math.ceil(5 * _OVERFLOW_LENGTH * height / block_px)
    taps = decay ** np.abs(np.arange(-reach, reach + 1))
    taps *= (1 - _GLOW_SHARE) / taps.sum()
    spilt = cv2.sepFilter2D(share, -1, np.ones(1), taps, borderType=cv2.BORDER_CONSTANT)

    coarse = cv2.resize(share, (-(-width // block_px), rows), interpolation=cv2.INTER_AREA)
    sigma = _GLOW_SIGMA * height / block_px
    glow = cv2.GaussianBlur(coarse, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    return spilt + _GLOW_SHARE * cv2.resize(glow, (width, rows))


def _saturation(luminance: np.ndarray) -> int:
    """Return the luminance from which on pixels count as saturated."""
    # A quarter or less of a large image's pixels is enough.
    step = max(1, min(luminance.shape) // 256)
    sample = np.ascontiguousarray(luminance[::step, ::step])
    counts = cv2.calcHist([sample], [0], None, [256], [0, 256]).ravel()
    reached = np.cumsum(counts[::-1]) >= _BRIGHTEST_SHARE * sample.size
    return min(_SATURATED, 255 - int(np.argmax(reached)))
