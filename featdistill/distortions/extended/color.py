"""Color of the extended library: colored light, lenses, and dyes that fade."""

import math
from functools import cache

import cv2
import numpy as np

from featdistill.distortions.kernels.srgb import from_linear, to_linear
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

# Luminance of linear sRGB (BT.709 primaries, D65), and linear sRGB of CIE XYZ (IEC 61966-2-1).
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
_RGB_OF_XYZ = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
_DAYLIGHT_K = 6500

# Density of the darkest tone of a glossy color print: 1 % of the light comes back.
_PRINT_BLACK = 2.0
# Share of the fading for each dye: cyan, which absorbs red, lasts worst in the dark, yellow best; and the
# stain that grows in the paper meanwhile, as a density in green and blue at a fading of 1 (round numbers
# after Wilhelm and Brower, "The Permanence and Care of Color Photographs", 1993).
_FADING_OF_DYE = (1.15, 1.0, 0.85)
_STAIN = (0.0, 0.04, 0.2)


@register(OPERATIONS, "color", (0.1, 0.2, 0.32, 0.46, 0.62), random=True)
def color_cast(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Tint of a random hue, as under colored light; scale: largest deviation of a channel's gain from 1.

    The gains of R, G and B in linear light are 1 + scale * cos(hue - 0, 120 and 240 degrees), divided by
    their luminance, so the luminance of grays does not change unless they clip.
    """
    hue = rng.uniform(0, 2 * math.pi)
    gains = 1 + color_cast.scales[level - 1] * np.cos(hue - 2 * math.pi / 3 * np.arange(3))
    return _through_curves(image, _gain_curves(gains))


@register(OPERATIONS, "color", (5600, 4800, 4000, 3300, 2700), random=True)
def white_balance(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """White balance for the wrong light, 6500 K instead of the scale or the reverse; scale: kelvin.

    Either the light has this color temperature and the camera is set to 6500 K, which makes the picture warm,
    or the reverse, which makes it cold. The gains in linear light are the ratio of the two black bodies.
    """
    kelvin, is_warm = white_balance.scales[level - 1], rng.random() < 0.5
    scene, camera = (kelvin, _DAYLIGHT_K) if is_warm else (_DAYLIGHT_K, kelvin)
    return _through_curves(image, _gain_curves(black_body(scene) / black_body(camera)))


@register(OPERATIONS, "color", (0.004, 0.007, 0.011, 0.017, 0.025), random=True)
def chromatic_aberration(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Lateral chromatic aberration: red and blue magnified by 1 +- scale, green not.

    Which of the two is larger is random, and so is the optical axis, within a tenth of the sides around the
    middle, as in a crop. Color fringes grow with the distance from it. Green, and with it nearly all of the
    luminance, stays in place, and so does the layout.
    """
    height, width = image.shape[:2]
    share = chromatic_aberration.scales[level - 1] * (1 if rng.random() < 0.5 else -1)
    axis = (np.array([width, height]) - 1) / 2 + rng.uniform(-0.1, 0.1, 2) * (width, height)
    red, green, blue = cv2.split(image)
    return cv2.merge([_magnified(red, 1 + share, axis), green, _magnified(blue, 1 - share, axis)])


@register(OPERATIONS, "color", (0.08, 0.16, 0.26, 0.38, 0.52))
def fading(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Old color print with faded dyes on yellowed paper; scale: lost share of the dyes' density.

    The density of a dye, the logarithm of the light it absorbs, falls in proportion everywhere: black becomes
    a brown gray, contrast and saturation go. Cyan fades most and yellow least, so the rest is warm.
    """
    return _through_curves(image, _faded(fading.scales[level - 1]))


def black_body(kelvin: float) -> np.ndarray:
    """Return the color of a black body: (3,) float64 linear sRGB of luminance 1.

    By Krystek, "An algorithm to calculate correlated colour temperature" (1985), for 1000 to 15000 K. Below
    1900 K the color is outside of sRGB and its blue negative.
    """
    u = 0.860117757 + 1.54118254e-4 * kelvin + 1.28641212e-7 * kelvin**2
    u /= 1 + 8.42420235e-4 * kelvin + 7.08145163e-7 * kelvin**2
    v = 0.317398726 + 4.22806245e-5 * kelvin + 4.20481691e-8 * kelvin**2
    v /= 1 - 2.89741816e-5 * kelvin + 1.61456053e-7 * kelvin**2
    x, y = 3 * u / (2 * u - 8 * v + 4), 2 * v / (2 * u - 8 * v + 4)
    return _RGB_OF_XYZ @ np.array([x / y, 1, (1 - x - y) / y])


def _gain_curves(gains: np.ndarray) -> np.ndarray:
    """Return curves that multiply linear light by gains, scaled to keep the luminance of gray."""
    gains = gains / (_LUMINANCE @ gains)
    return _curves(to_linear(np.arange(256) / 255) * gains[:, None])


@cache
def _faded(share: float) -> np.ndarray:
    black = 10**-_PRINT_BLACK
    density = -np.log10(black + (1 - black) * to_linear(np.arange(256) / 255))
    remaining = 1 - share * np.array(_FADING_OF_DYE)
    faded = density * remaining[:, None] + share * np.array(_STAIN)[:, None]
    return _curves((10**-faded - black) / (1 - black))


def _curves(light: np.ndarray) -> np.ndarray:
    return np.rint(255 * from_linear(light)).astype(np.uint8)


def _through_curves(image: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Look up every channel in its own curve, (3, 256) uint8."""
    planes = (cv2.LUT(plane, curve) for plane, curve in zip(cv2.split(image), curves, strict=True))
    return cv2.merge(list(planes))


def _magnified(plane: np.ndarray, factor: float, center: np.ndarray) -> np.ndarray:
    """Magnify (H, W) uint8 about a point (x, y), edges replicated."""
    height, width = plane.shape
    shift = center * (1 - 1 / factor)
    matrix = np.array([[1 / factor, 0, shift[0]], [0, 1 / factor, shift[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(plane, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
