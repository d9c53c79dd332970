"""Noise of the extended library: what light, sensors and their electronics do to the values of a photograph.

Values are those of 8-bit sRGB unless linear light is spoken of; a standard deviation in steps is one of 255.
"""

from functools import cache

import cv2
import numpy as np

from featdistill.distortions.kernels.noise_tables import (
    draw_responses,
    normal_quantiles,
    poisson_quantiles,
    random_bytes,
    response_table,
)
from featdistill.distortions.kernels.scratch import in_strips
from featdistill.distortions.kernels.srgb import from_linear, to_linear
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

# Electrons (RMS) that reading a photosite adds: usual for today's CMOS sensors.
_READ_NOISE = 1.5
# Standard deviations of the Gaussians that make grain: gain noise is a mottle of about 3 px; of a processed
# photograph, demosaicing has smoothed the lightness a little and noise reduction the colour a lot.
_GAIN_GRAIN_PX = 1.2
_LUMA_GRAIN_PX = 0.7
_CHROMA_GRAIN_PX = 2.0
# Noise of colour in units of that of lightness, and read noise as a share of the photon noise of white.
_CHROMA_SHARE = 0.5
_FLOOR = 0.004
# What `_FIELD_UNIT` steps of a byte mean is one standard deviation; four of them stay within the byte.
_FIELD_UNIT = 24


@register(OPERATIONS, "noise", (800, 300, 120, 50, 20), random=True)
def poisson_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Photon counting of the values as they are: a Poisson count with a mean of so many for white.

    The textbook model, which takes the 8-bit value itself for the intensity: the variance of a sample is its
    mean, counted in photons, whatever its channel and place. `shot_noise` is the same in linear light.
    """
    return draw_responses(image, _poisson(poisson_noise.scales[level - 1]), rng)


@register(OPERATIONS, "noise", (200, 80, 32, 14, 6), random=True)
def speckle_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Coherent speckle: every sample times an independent gamma variable, the mean of so many looks.

    Coherent light (laser, radar, ultrasound) that a rough surface scatters interferes with itself: the
    intensity of one look is exponentially distributed, and the mean of L looks is gamma-distributed with a
    standard deviation of 1 / sqrt(L) of its mean (Goodman, 1976). The three channels are three wavelengths,
    whose speckle is independent; a grain is a pixel wide.
    """
    return draw_responses(image, _speckle(speckle_noise.scales[level - 1]), rng)


@register(OPERATIONS, "noise", (0.04, 0.07, 0.1, 0.14, 0.19), random=True)
def multiplicative_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Gain noise: all channels of a pixel times one Gaussian factor, 1 +- so much, in a mottle of 3 px.

    Light that passes something uneven (the grain of a print, dust, a rough screen) before it is split into
    colours loses the same share in all of them: hue and saturation stay, lightness is mottled. So it differs
    from `speckle_noise`, which is skewed, coloured and independent from pixel to pixel.
    """
    gain = multiplicative_noise.scales[level - 1]
    field, deviation = smooth_field(*image.shape[:2], _GAIN_GRAIN_PX, rng)
    unit = 128
    factors = unit * (1 + gain / deviation * (np.arange(256) - 127.5))
    factor = cv2.LUT(field, np.rint(np.clip(factors, 0, 255)).astype(np.uint8))
    return cv2.multiply(image, cv2.merge([factor, factor, factor]), scale=1 / unit)


@register(OPERATIONS, "noise", (1200, 450, 180, 80, 36), random=True)
def shot_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Sensor noise in linear light: photons, so many for white, counted with a read noise of 1.5 electrons.

    The value is decoded to linear light by the sRGB curve; a photosite collects a Poisson number of
    electrons, reading adds Gaussian noise, and the sum is encoded again (Foi et al., 2008). In linear light
    the variance is mean / photons + (1.5 / photons)^2, so a higher ISO speed is fewer photons.
    """
    return draw_responses(image, _shot(shot_noise.scales[level - 1]), rng)


@register(OPERATIONS, "noise", (1.5, 3, 5, 8, 12), random=True)
def fixed_pattern_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Pattern of an uncorrected sensor: columns offset by N(0, scale^2) steps, photosites uneven in gain.

    Every column of a CMOS sensor has an amplifier of its own, whose offset all its pixels share in all
    channels; and every photosite has its own sensitivity, 1 + N(0, (scale / 255)^2) here, so that both parts
    are equal at white. The pattern would be the same in all photographs of one sensor; a call draws a sensor.
    """
    steps = fixed_pattern_noise.scales[level - 1]
    offsets = np.rint(rng.normal(0, steps, image.shape[1])).astype(np.int16)
    row = np.repeat(offsets, 3).reshape(1, -1, 3)

    def expose(strip: np.ndarray) -> np.ndarray:
        uneven = draw_responses(strip, _uneven(steps), rng)
        return cv2.add(uneven, np.repeat(row, len(strip), axis=0), dtype=cv2.CV_8U)

    return in_strips(expose, image)


@register(OPERATIONS, "noise", (0.0005, 0.0015, 0.004, 0.008, 0.015), random=True)
def dead_pixels(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Dead and hot photosites, this share of all, as a colour photograph shows them after demosaicing.

    A photosite of a Bayer sensor (RGGB) measures one colour: a dead one reads 0, a hot one the maximum, each
    with probability 1/2. Its neighbours borrow that colour from it: bilinear demosaicing gives a green one
    as 1/4 to the 4 around it, a red or blue one as 1/2 to those 4 and 1/4 to the diagonal ones. So it is seen
    as a small coloured cross or square with an extreme sample in its middle.
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
        place = (y[here], x[here], channels[here])
        share = np.where(green, 0.25, 0.25 if diagonal else 0.5)[here]
        noisy[place] = np.clip(np.rint(noisy[place] + share * change[here]), 0, 255)
    noisy[rows, columns, channels] = values
    return noisy


@register(OPERATIONS, "noise", (2, 4, 6.5, 9.5, 13), random=True)
def iso_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Grain of a high ISO speed: fine in lightness, so many steps at middle grey, and blotchy in colour.

    Noise as a camera's own processing leaves it in its JPEGs: neighbouring pixels share it, since
    demosaicing and noise reduction average (Gaussians of 0.7 px in luma and of 2 px in chroma, which has half
    the deviation of luma). Photon and read noise grow with the square root of the light, and the sRGB curve
    stretches the shadows: there the deviation is up to twice that of middle grey, in white 0.9 of it.
    """
    height, width = image.shape[:2]
    planes = []
    for sigma_px, unit in (
        (_LUMA_GRAIN_PX, _FIELD_UNIT),
        (_CHROMA_GRAIN_PX, _CHROMA_SHARE * _FIELD_UNIT),
        (_CHROMA_GRAIN_PX, _CHROMA_SHARE * _FIELD_UNIT),
    ):
        field, deviation = smooth_field(height, width, sigma_px, rng)
        scaled = 128 + unit / deviation * (np.arange(256) - 127.5)
        planes.append(cv2.LUT(field, np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)))
    amplitude, scale = _iso_amplitudes(iso_noise.scales[level - 1])
    noise = cv2.cvtColor(cv2.merge(planes), cv2.COLOR_YCrCb2RGB)
    deviations = cv2.cvtColor(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), amplitude), cv2.COLOR_GRAY2RGB)
    middle = (128, 128, 128, 0)
    lighter = cv2.multiply(cv2.subtract(noise, middle), deviations, scale=scale)
    darker = cv2.multiply(cv2.subtract(middle, noise), deviations, scale=scale)
    return cv2.subtract(cv2.add(image, lighter), darker)


def smooth_field(
    height: int, width: int, sigma_px: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Draw noise that neighbouring pixels share: white noise, smoothed with a Gaussian.

    Returns:
        (H, W) uint8, nearly normal around 127.5, and its standard deviation in steps.
    """
    reach = int(np.ceil(3 * sigma_px))
    # Smoothed beyond the image: at an edge that is replicated the deviation would be larger.
    shape = (height + 2 * reach, width + 2 * reach)
    white = random_bytes(rng, shape[0] * shape[1]).reshape(shape)
    side = 2 * reach + 1
    smooth = cv2.GaussianBlur(white, (side, side), sigma_px)[reach:-reach, reach:-reach]
    taps = cv2.getGaussianKernel(side, sigma_px)
    uniform = ((256**2 - 1) / 12) ** 0.5
    return smooth, uniform * float((taps**2).sum())


@cache
def _poisson(white: float) -> np.ndarray:
    return response_table(lambda value, count: poisson_quantiles(white * value, count) / white)


@cache
def _speckle(looks: float) -> np.ndarray:
    # The gamma distribution of mean 1 by its density on a fine grid.
    grid = np.linspace(0, 1 + 12 / looks**0.5, 1 << 16)[1:]
    density = np.exp((looks - 1) * np.log(grid) - looks * (grid - 1))
    shares = np.cumsum(density) / density.sum()

    def speckled(value: np.ndarray, count: int) -> np.ndarray:
        return value * np.interp((np.arange(count) + 0.5) / count, shares, grid)

    return response_table(speckled)


@cache
def _shot(white: float) -> np.ndarray:
    def read(value: np.ndarray, count: int) -> np.ndarray:
        electrons = poisson_quantiles(white * to_linear(value), count)
        # The i-th count meets the quantile of the reversed bits of i: as good as independent of it.
        bits = count.bit_length() - 1
        partner = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(count)]
        return from_linear((electrons + _READ_NOISE * normal_quantiles(count)[partner]) / white)

    return response_table(read)


@cache
def _uneven(steps: float) -> np.ndarray:
    return response_table(lambda value, count: value * (1 + steps / 255 * normal_quantiles(count)))


@cache
def _iso_amplitudes(steps: float) -> tuple[np.ndarray, float]:
    """Return the noise's deviation by grey value as (256,) uint8, and what turns the product into steps."""
    light = to_linear(np.arange(256) / 255)
    slope = np.gradient(light)
    relative = np.sqrt(light + _FLOOR) / slope
    relative /= relative[128]
    return np.rint(255 / relative.max() * relative).astype(np.uint8), (
        steps * float(relative.max()) / (255 * _FIELD_UNIT)
    )
