"""Noise of the extended library: what light, sensors and their electronics do to values.

Values are 8-bit sRGB unless stated otherwise; standard deviations are on the scale 0-255.
"""

from functools import cache

import cv2
import numpy as np

from featdistill.distortions.kernels.noise_tables import (
    draw_responses,
    gain_table,
    middle_shares,
    normal_quantiles,
    photon_table,
    poisson_quantiles,
    response_table,
    smooth_noise,
)
from featdistill.distortions.kernels.scratch import in_strips
from featdistill.distortions.kernels.srgb import from_linear, to_linear
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

# Electrons (RMS) added by reading a photosite, typical of today's CMOS sensors.
_READ_NOISE = 1.5
# Sigma of the Gaussians that make grain. Gain noise is a mottle of about 3 px; in a processed photograph,
# demosaicing has smoothed the lightness a little and noise reduction the color a lot.
_GAIN_GRAIN_PX = 1.2
_LUMA_GRAIN_PX = 0.7
_CHROMA_GRAIN_PX = 2.0
# Noise of color relative to that of lightness, and read noise relative to the photon noise of white.
_CHROMA_SHARE = 0.5
_FLOOR = 0.004
# Steps of a byte per standard deviation of a field; four deviations fit into the byte.
_FIELD_UNIT = 24


@register(OPERATIONS, "noise", (800, 400, 200, 110, 60), random=True)
def poisson_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Photon noise of the values as they are; scale: photons for white.

    The textbook model, with the 8-bit value as the intensity. `shot_noise` is the same in linear light.
    """
    return draw_responses(image, photon_table(poisson_noise.scales[level - 1]), rng)


@register(OPERATIONS, "noise", (400, 200, 110, 62, 36), random=True)
def speckle_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Coherent speckle: every sample times an independent gamma variable; scale: number of looks.

    Coherent light (laser, radar, ultrasound) scattered by a rough surface interferes with itself: the mean of
    L looks is gamma-distributed with a relative standard deviation of 1 / sqrt(L) (Goodman, 1976). The
    channels are three wavelengths, whose speckle is independent; a grain is a pixel wide.
    """
    return draw_responses(image, _speckle(speckle_noise.scales[level - 1]), rng)


@register(OPERATIONS, "noise", (0.04, 0.06, 0.085, 0.12, 0.16), random=True)
def multiplicative_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Gain noise: pixels times a Gaussian factor in a mottle of 3 px; scale: the factor's deviation.

    Light that passes something uneven (the grain of a print, dust, a rough screen) loses the same share of
    all colors: hue and saturation do not change, lightness is mottled. `speckle_noise`, in contrast, is
    skewed, colored and independent from pixel to pixel.
    """
    gain = multiplicative_noise.scales[level - 1]
    field, deviation = smooth_noise(*image.shape[:2], _GAIN_GRAIN_PX, rng)
    unit = 128
    factors = unit * (1 + gain / deviation * (np.arange(256) - 127.5))
    factor = cv2.LUT(field, np.rint(np.clip(factors, 0, 255)).astype(np.uint8))
    return cv2.multiply(image, cv2.merge([factor, factor, factor]), scale=1 / unit)


@register(OPERATIONS, "noise", (1200, 600, 300, 150, 75), random=True)
def shot_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Sensor noise in linear light, with a read noise of 1.5 electrons; scale: photons for white.

    A photosite collects a Poisson number of electrons in proportion to linear light, reading adds Gaussian
    noise, and the sum is encoded with the sRGB curve again (Foi et al., 2008). In linear light the variance
    is mean / photons + (1.5 / photons)^2, so a higher ISO speed means fewer photons.
    """
    return draw_responses(image, _shot(shot_noise.scales[level - 1]), rng)


@register(OPERATIONS, "noise", (3, 4.5, 6.5, 9, 12), random=True)
def fixed_pattern_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Uncorrected sensor: offsets of columns and uneven gain of photosites; scale: deviation (0-255).

    Every column of a CMOS sensor has its own amplifier, whose offset N(0, scale^2) all its pixels share, and
    every photosite its own sensitivity 1 + N(0, (scale / 255)^2), so both parts are equal at white. All
    photographs of one sensor share the pattern; here every call draws a sensor.
    """
    steps = fixed_pattern_noise.scales[level - 1]
    offsets = np.rint(rng.normal(0, steps, image.shape[1])).astype(np.int16)
    row = np.repeat(offsets, 3).reshape(1, -1, 3)

    def expose(strip: np.ndarray) -> np.ndarray:
        uneven = draw_responses(strip, gain_table(steps / 255), rng)
        return cv2.add(uneven, np.repeat(row, len(strip), axis=0), dtype=cv2.CV_8U)

    return in_strips(expose, image)


@register(OPERATIONS, "noise", (0.001, 0.002, 0.004, 0.008, 0.015), random=True)
def dead_pixels(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Dead and hot photosites after demosaicing; scale: their share.

    A photosite of a Bayer sensor (RGGB) measures one color: a dead one reads 0, a hot one the maximum, with
    equal probability. Bilinear demosaicing spreads a green one with 1/4 to the 4 pixels around it, a red or
    blue one with 1/2 to those 4 and 1/4 to the diagonal ones, as a small colored cross or square.
    """
    height, width = image.shape[:2]
    noisy = image.copy(order="C")
    count = max(1, round(dead_pixels.scales[level - 1] * height * width))
    rows, columns = np.divmod(rng.integers(0, height * width, count), width)
    values = 255 * rng.integers(0, 2, count)
    channels = rows % 2 + columns % 2
    change = values - image[rows, columns, channels]
    green = channels == 1
    for down, across in ((-1, 0), (0, -1), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)):
        diagonal = down and across
        here = ~green if diagonal else np.full(count, True)
        y, x = rows + down, columns + across
        here &= (y >= 0) & (y < height) & (x >= 0) & (x < width)
        neighbor = (y[here], x[here], channels[here])
        share = np.where(green, 0.25, 0.25 if diagonal else 0.5)[here]
        noisy[neighbor] = np.clip(np.rint(noisy[neighbor] + share * change[here]), 0, 255)
    noisy[rows, columns, channels] = values
    return noisy


@register(OPERATIONS, "noise", (2.5, 4, 6.5, 9.5, 13), random=True)
def iso_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """High-ISO grain, fine in lightness and blotchy in color; scale: deviation at middle gray (0-255).

    As in a camera's own JPEGs, demosaicing and noise reduction average neighboring pixels (Gaussians of 0.7
    px in luma and 2 px in chroma, which has half the deviation). The deviation in shadows is up to twice that
    of middle gray, because the sRGB curve stretches them; in white it is 0.9 of it.
    """
    height, width = image.shape[:2]
    planes = []
    chroma = (_CHROMA_GRAIN_PX, _CHROMA_SHARE * _FIELD_UNIT)
    for sigma_px, unit in ((_LUMA_GRAIN_PX, _FIELD_UNIT), chroma, chroma):
        field, deviation = smooth_noise(height, width, sigma_px, rng)
        scaled = 128 + unit / deviation * (np.arange(256) - 127.5)
        planes.append(cv2.LUT(field, np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)))
    amplitude, scale = _iso_amplitudes(iso_noise.scales[level - 1])
    noise = cv2.cvtColor(cv2.merge(planes), cv2.COLOR_YCrCb2RGB)
    deviations = cv2.cvtColor(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), amplitude), cv2.COLOR_GRAY2RGB)
    middle = (128, 128, 128, 0)
    lighter = cv2.multiply(cv2.subtract(noise, middle), deviations, scale=scale)
    darker = cv2.multiply(cv2.subtract(middle, noise), deviations, scale=scale)
    return cv2.subtract(cv2.add(image, lighter), darker)


@cache
def _speckle(looks: float) -> np.ndarray:
    # The gamma distribution of mean 1 by its density on a fine grid.
    grid = np.linspace(0, 1 + 12 / looks**0.5, 1 << 16)[1:]
    density = np.exp((looks - 1) * np.log(grid) - looks * (grid - 1))
    shares = np.cumsum(density) / density.sum()
    return response_table(lambda value, count: value * np.interp(middle_shares(count), shares, grid))


@cache
def _shot(white: float) -> np.ndarray:
    def read(value: np.ndarray, count: int) -> np.ndarray:
        electrons = poisson_quantiles(white * to_linear(value), count)
        # Pairing the i-th count with the quantile of the reversed bits of i is as good as independence.
        bits = count.bit_length() - 1
        partner = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(count)]
        return from_linear((electrons + _READ_NOISE * normal_quantiles(count)[partner]) / white)

    return response_table(read)


@cache
def _iso_amplitudes(steps: float) -> tuple[np.ndarray, float]:
    """Return the noise's deviation by gray value as (256,) uint8, and its unit on the scale 0-255."""
    light = to_linear(np.arange(256) / 255)
    relative = np.sqrt(light + _FLOOR) / np.gradient(light)
    relative /= relative[128]
    amplitude = np.rint(255 / relative.max() * relative).astype(np.uint8)
    return amplitude, steps * float(relative.max()) / (255 * _FIELD_UNIT)
