"""Film and tubes of the extras: grain, stray light in the camera, and an image intensifier at night."""

import math
from functools import cache

import cv2
import numpy as np

from featdistill.distortions.kernels.filters import gaussian_blur, screen
from featdistill.distortions.kernels.noise_tables import (
    draw_responses,
    poisson_quantiles,
    random_bytes,
    response_table,
)
from featdistill.distortions.kernels.scratch import kept
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

# Faster films have coarser grain: sigma of the Gaussian that white noise is filtered with, by level.
_GRAIN_SIGMA_PX = (0.6, 0.7, 0.8, 0.95, 1.1)
# A random byte has this deviation.
_BYTE_DEVIATION = math.sqrt((256**2 - 1) / 12)

_LEAK_SIDE_PX = 64
# Red goes through all layers of a colour film, blue stops in the first: each channel gets the light to this
# power, times this share.
_LEAK_COLOUR = ((1.0, 1.0), (1.8, 0.75), (3.5, 0.45))

_GAMMA = 2.2
# How much more light the tube shows than a photograph, what its control makes of the mean value and how much
# that may gain, the blur of its screen, and what the vignette takes from the corners, by level.
_TUBE_GAIN = 1.5
_TUBE_MEAN, _TUBE_MOST_GAIN = 90, 4.0
_TUBE_SIGMA_PX = 0.6
_TUBE_CORNER_LOSS = (0.35, 0.45, 0.55, 0.65, 0.75)


@register(OPERATIONS, "film", (4, 7, 11, 16, 23), random=True)
def film_grain(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Grain of a film: correlated noise of luminance, of this deviation (of 255) where it is strongest.

    The number of grains on a small area is random and the density D of the film in proportion to it, so D
    has a deviation in proportion to sqrt(D) (Nutting, "On the absorption of light in heterogeneous media",
    1913). Of a value v = 10^(-D / 2.2) in [0, 1] that makes v sqrt(-log v) up to a factor: most at 0.61, less
    in shadows, none in black and white. The three channels get the same noise, after the luminance. Grains
    are wider than a pixel: the noise is filtered with a Gaussian of 0.6 to 1.1 px, more by level, as faster
    films have both more and coarser grain.
    """
    shape = image.shape[:2]
    sigma_px = _GRAIN_SIGMA_PX[level - 1]
    noise = random_bytes(rng, shape[0] * shape[1]).reshape(shape)
    # Twice the distance to the mean of 127.5, a whole number.
    grain = cv2.LUT(gaussian_blur(noise, sigma_px), 2 * np.arange(256, dtype=np.int16) - 255)
    weights = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), _grain_weights())
    scale = film_grain.scales[level - 1] / (255 * 2 * _BYTE_DEVIATION * _gaussian_gain(sigma_px))
    cv2.multiply(grain, weights, dst=grain, scale=scale)
    merged = cv2.merge([grain, grain, grain], kept("grain", image.shape, np.int16))
    return cv2.add(image, merged, dtype=cv2.CV_8U)


@register(OPERATIONS, "film", (0.35, 0.55, 0.75, 0.95, 1.15), random=True)
def light_leak(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Warm light that has come into the camera at an edge, of a strength (1: white at the edge).

    It falls smoothly from one side of the image, at any angle, with a reach that varies along the edge, and
    with a second plume from the same side. Light that comes through the base of a colour film exposes the
    layer for red first, so red reaches farthest and the leak goes from a pale yellow over orange to red. It
    adds to the exposure as in a double exposure ("screen").
    """
    layer = leaked_light(*image.shape[:2], light_leak.scales[level - 1], rng)
    light = kept("light", image.shape, np.float32)
    cv2.resize(layer, image.shape[1::-1], dst=light, interpolation=cv2.INTER_CUBIC)
    return screen(image, cv2.convertScaleAbs(light))


@register(OPERATIONS, "film", (300, 110, 50, 25, 13), random=True)
def night_vision(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """An image intensifier's green screen, in a night with so many photons a pixel from white.

    Luminance in linear light is counted in photons (Poisson), amplified 1.5 times more than a photograph's
    exposure, so that highlights saturate, and shown by a green phosphor, whitish where it is driven hard.
    Pictures with a mean value below 90 are first brightened to that, up to fourfold, as such a tube's
    automatic control does. The screen blurs by 0.6 px and the eyepiece vignettes: the corners lose 35 to 75 %
    of the value, more by level.
    """
    luminance = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    gain = min(max(_TUBE_MEAN / max(cv2.mean(luminance)[0], 1.0), 1.0), _TUBE_MOST_GAIN)
    cv2.convertScaleAbs(luminance, dst=luminance, alpha=gain)
    shown = draw_responses(luminance[..., None], _amplified(night_vision.scales[level - 1]), rng)[..., 0]
    shown = gaussian_blur(shown, _TUBE_SIGMA_PX)
    height, width = shown.shape
    down, across = (
        np.rint(127 * np.linspace(-1, 1, side) ** 2).astype(np.uint8)[:, None] for side in (height, width)
    )
    vignette = cv2.LUT(down + across.T, _corner_gain(_TUBE_CORNER_LOSS[level - 1]))
    cv2.multiply(shown, vignette, dst=shown, scale=1 / 255)
    return cv2.merge([cv2.LUT(shown, curve) for curve in _phosphor()])


def leaked_light(height: int, width: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the light of a leak.

    Args:
        height: of the image.
        width: of the image.
        strength: of the light where it comes in; 1 is white in red.
        rng: what its direction and shape are drawn from.

    Returns:
        (h, w, 3) float32 light, 255 for white or more, on a layer of at most 64 px on the shorter side.
    """
    ratio = min(1, _LEAK_SIDE_PX / min(height, width))
    rows, columns = round(height * ratio), round(width * ratio)
    angle = rng.uniform(0, 2 * math.pi)
    # Both from -1 to 1 in the image: towards the edge where the light is, and along that edge.
    y, x = np.linspace(-1, 1, rows)[:, None], np.linspace(-1, 1, columns)
    towards, along = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    distance = (abs(math.cos(angle)) + abs(math.sin(angle)) - towards) / 2
    first, second = rng.uniform(0, 2 * math.pi, 2)
    waviness = 0.3 * np.sin(2.1 * along + first) + 0.2 * np.sin(4.7 * along + second)
    reach = (0.2 + 0.12 * strength) * (1 + waviness)
    place, plume_width = rng.uniform(-0.7, 0.7), rng.uniform(0.12, 0.3)
    plume = np.exp(-(((along - place) / plume_width) ** 2) - (distance / (0.3 + 0.25 * strength)) ** 2)
    light = np.exp(-((distance / reach) ** 2))
    light += 0.6 * plume * (1 - light)
    channels = [255 * share * strength * light**power for power, share in _LEAK_COLOUR]
    return np.stack(channels, axis=-1).astype(np.float32)


@cache
def _grain_weights() -> np.ndarray:
    value = np.arange(256) / 255
    deviation = value * np.sqrt(-np.log(np.maximum(value, 1e-9)))
    return np.rint(255 * deviation / deviation.max()).astype(np.int16)


@cache
def _gaussian_gain(sigma_px: float) -> float:
    """Return what `gaussian_blur` leaves of the deviation of white noise."""
    taps = cv2.getGaussianKernel(2 * math.ceil(3 * sigma_px) + 1, sigma_px)
    return float((taps**2).sum())


@cache
def _amplified(white: float) -> np.ndarray:
    def counted(value: np.ndarray, count: int) -> np.ndarray:
        return (_TUBE_GAIN * poisson_quantiles(white * value**_GAMMA, count) / white) ** (1 / _GAMMA)

    return response_table(counted)


@cache
def _corner_gain(loss: float) -> np.ndarray:
    """Return the gain, of 255, by the squared distance to the middle, which is 254 in the corners."""
    squared = np.minimum(np.arange(256) / 254, 1)
    return np.rint(255 * (1 - loss * squared**1.5)).astype(np.uint8)


@cache
def _phosphor() -> np.ndarray:
    """Return (3, 256) uint8: the colour of the screen by the value that it shows."""
    value = np.arange(256) / 255
    red, blue = 0.22 * value + 0.4 * value**3, 0.2 * value + 0.25 * value**3
    return np.rint(255 * np.stack([red, value, blue])).astype(np.uint8)
