"""Film and tubes of the extras: grain, stray light in the camera, and an image intensifier at night."""

import math
from functools import cache

import cv2
import numpy as np

from featdistill.distortions.kernels.filters import gaussian_blur, layer_size, screen
from featdistill.distortions.kernels.noise_tables import draw_responses, photon_table, random_bytes
from featdistill.distortions.kernels.scratch import scratch_array
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

# Faster films have coarser grain: sigma of the Gaussian that filters white noise, by level.
_GRAIN_SIGMA_PX = (0.6, 0.7, 0.8, 0.95, 1.1)
# Standard deviation of a random byte.
_BYTE_DEVIATION = math.sqrt((256**2 - 1) / 12)

_LEAK_SIDE_PX = 64
# Power and share of the light for R, G, B: red passes all layers of a color film, blue stops in the first.
_LEAK_COLOR = ((1.0, 1.0), (1.8, 0.75), (3.5, 0.45))

_GAMMA = 2.2
# Gain of the tube over a photograph, the mean value its control aims for and how much that may amplify, the
# blur of its screen, and the vignette's loss in the corners, by level.
_TUBE_GAIN = 1.5
_TUBE_MEAN, _TUBE_MAX_GAIN = 90, 4.0
_TUBE_SIGMA_PX = 0.6
_TUBE_CORNER_LOSS = (0.35, 0.45, 0.55, 0.65, 0.75)


@register(OPERATIONS, "film", (4, 7, 11, 16, 23), random=True)
def film_grain(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Film grain, correlated noise of luminance; scale: deviation where it is strongest (0-255).

    The number of grains on a small area is random and the density D of the film proportional to it, so D has
    a deviation proportional to sqrt(D) (Nutting, "On the absorption of light in heterogeneous media", 1913).
    For a value v = 10^(-D / 2.2) in [0, 1] this makes v sqrt(-log v) up to a factor: most at 0.61, none in
    black and white. All channels get the same noise, by luminance. It is filtered with a Gaussian of 0.6 to
    1.1 px, since faster films have both more and coarser grain.
    """
    shape = image.shape[:2]
    sigma_px = _GRAIN_SIGMA_PX[level - 1]
    noise = random_bytes(rng, shape[0] * shape[1]).reshape(shape)
    # Twice the distance to the mean of 127.5, an integer.
    grain = cv2.LUT(gaussian_blur(noise, sigma_px), 2 * np.arange(256, dtype=np.int16) - 255)
    weights = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), _grain_weights())
    scale = film_grain.scales[level - 1] / (255 * 2 * _BYTE_DEVIATION * _gaussian_gain(sigma_px))
    cv2.multiply(grain, weights, dst=grain, scale=scale)
    merged = cv2.merge([grain, grain, grain], scratch_array("grain", image.shape, np.int16))
    return cv2.add(image, merged, dtype=cv2.CV_8U)


@register(OPERATIONS, "film", (0.35, 0.55, 0.75, 0.95, 1.15), random=True)
def light_leak(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Warm light that leaks into the camera from one side; scale: strength (1: white at the edge).

    It falls off smoothly from any side or corner, with a reach that varies along the edge, and with a second
    plume from the same side. Light through the base of a color film exposes the red layer first, so the leak
    goes from a pale yellow over orange to red. It is added as in a double exposure.
    """
    layer = leaked_light(*image.shape[:2], light_leak.scales[level - 1], rng)
    light = scratch_array("light", image.shape, np.float32)
    cv2.resize(layer, image.shape[1::-1], dst=light, interpolation=cv2.INTER_CUBIC)
    return screen(image, cv2.convertScaleAbs(light))


@register(OPERATIONS, "film", (300, 110, 50, 25, 13), random=True)
def night_vision(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Green screen of an image intensifier at night; scale: photons per pixel for white.

    Luminance in linear light is counted in photons, amplified 1.5 times, so highlights saturate, and shown by
    a green phosphor, whitish where it is bright. Pictures with a mean value below 90 are first brightened to
    that, up to fourfold, as by such a tube's automatic control. The screen blurs by 0.6 px and the eyepiece
    vignettes: the corners lose 35 to 75 % of the value, more by level.
    """
    luminance = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    gain = min(max(_TUBE_MEAN / max(cv2.mean(luminance)[0], 1.0), 1.0), _TUBE_MAX_GAIN)
    cv2.convertScaleAbs(luminance, dst=luminance, alpha=gain)
    responses = photon_table(night_vision.scales[level - 1], _GAMMA, _TUBE_GAIN)
    shown = gaussian_blur(draw_responses(luminance[..., None], responses, rng)[..., 0], _TUBE_SIGMA_PX)
    height, width = shown.shape
    down, across = (
        np.rint(127 * np.linspace(-1, 1, side) ** 2).astype(np.uint8)[:, None] for side in (height, width)
    )
    # By the squared distance to the middle, which is 254 in the corners.
    squared = np.minimum(np.arange(256) / 254, 1)
    gains = np.rint(255 * (1 - _TUBE_CORNER_LOSS[level - 1] * squared**1.5)).astype(np.uint8)
    vignette = cv2.LUT(down + across.T, gains)
    cv2.multiply(shown, vignette, dst=shown, scale=1 / 255)
    return cv2.merge([cv2.LUT(shown, curve) for curve in _phosphor()])


def leaked_light(height: int, width: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the light of a leak on a layer, (h, w, 3) float32, 255 for white or more."""
    rows, columns = layer_size(height, width, _LEAK_SIDE_PX)
    angle = rng.uniform(0, 2 * math.pi)
    # Both from -1 to 1 in the image: towards the edge where the light is, and along that edge.
    y, x = np.linspace(-1, 1, rows)[:, None], np.linspace(-1, 1, columns)
    towards, along = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    distance = (abs(math.cos(angle)) + abs(math.sin(angle)) - towards) / 2
    first, second = rng.uniform(0, 2 * math.pi, 2)
    waviness = 0.3 * np.sin(2.1 * along + first) + 0.2 * np.sin(4.7 * along + second)
    reach = (0.2 + 0.12 * strength) * (1 + waviness)
    plume_at, plume_width = rng.uniform(-0.7, 0.7), rng.uniform(0.12, 0.3)
    plume = np.exp(-(((along - plume_at) / plume_width) ** 2) - (distance / (0.3 + 0.25 * strength)) ** 2)
    light = np.exp(-((distance / reach) ** 2))
    light += 0.6 * plume * (1 - light)
    channels = [255 * share * strength * light**power for power, share in _LEAK_COLOR]
    return np.stack(channels, axis=-1).astype(np.float32)


@cache
def _grain_weights() -> np.ndarray:
    value = np.arange(256) / 255
    deviation = value * np.sqrt(-np.log(np.maximum(value, 1e-9)))
    return np.rint(255 * deviation / deviation.max()).astype(np.int16)


@cache
def _gaussian_gain(sigma_px: float) -> float:
    """Return the share of white noise's deviation that `gaussian_blur` leaves."""
    taps = cv2.getGaussianKernel(2 * math.ceil(3 * sigma_px) + 1, sigma_px)
    return float((taps**2).sum())


@cache
def _phosphor() -> np.ndarray:
    """Return the color of the screen by value, (3, 256) uint8."""
    value = np.arange(256) / 255
    red, blue = 0.22 * value + 0.4 * value**3, 0.2 * value + 0.25 * value**3
    return np.rint(255 * np.stack([red, value, blue])).astype(np.uint8)
