"""Environment of the extended library: weather between scene and camera, and light in its lens.

Everything drawn scales with the image's shorter side, and the same seed draws the same things at every level,
of which a higher level shows more. Added light saturates as in a double exposure (see `screen`). Positions
from the middle are (x, y) in half sides.
"""

import math

import cv2
import numpy as np

from featdistill.distortions.kernels.filters import layer_size, screen
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

# Everything is drawn on layers with at most this shorter side, which are then enlarged to the image.
_FOG_SIDE_PX = 32
_GLOW_SIDE_PX = 128
_GHOST_SIDE_PX = 320
# Depth at the lower edge; the farthest is 1.
_NEAREST = 0.2
# Rain by distance, the farthest first: share of the streaks, shorter side of the layer, length as a share of
# it, and light (0-255). Near streaks are longer and, out of focus, wider and fainter.
_RAIN = ((0.7, 320, 0.055, 110), (0.25, 320, 0.11, 140), (0.05, 128, 0.22, 90))
_STEEPEST_SLANT = 0.35
_SLANT_SPREAD = 0.03
_RAIN_VEIL = np.array([190, 195, 200])
_RAIN_VEIL_SHARE = 0.25
# Snow by distance, the farthest first: share of the flakes, shorter side of the layer, radius in px of the
# layer, exponent of the flake's profile (1 is a Gaussian; more has a sharper rim), and light (0-255).
_SNOW = ((0.78, 384, 0.8, 1.5, 200), (0.18, 192, 1.3, 2.5, 235), (0.04, 112, 2.4, 1.5, 150))
_SNOW_HAZE = 45
_GHOSTS = 9


@register(OPERATIONS, "environment", (0.12, 0.35, 0.7, 1.2, 1.8), random=True)
def fog(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Fog by Koschmieder's law; scale: optical depth to the farthest point.

    The image J becomes J t + A (1 - t) with t = exp(-optical depth * depth) and a light gray airlight A. The
    assumed depth rises from 0.2 at the lower edge to 1 at the upper, as on a plain, and varies by patches.
    """
    airlight = rng.uniform(200, 240) + rng.uniform(-6, 6, 3)
    passing = np.exp(-fog.scales[level - 1] * fog_depth(*image.shape[:2], rng))[..., None]
    size = image.shape[1::-1]
    transmission = cv2.resize(np.rint(255 * passing).astype(np.uint8), size)
    veil = cv2.resize(np.rint((1 - passing) * airlight).astype(np.uint8), size)
    fogged = cv2.multiply(image, cv2.cvtColor(transmission, cv2.COLOR_GRAY2RGB), scale=1 / 255)
    return cv2.add(fogged, veil, dst=fogged)


@register(OPERATIONS, "environment", (50, 110, 190, 290, 420), random=True)
def rain(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Rain streaks and a slight veil; scale: number of streaks on a square of the shorter side.

    Drops leave thin translucent streaks, brighter than the background because they collect light from much of
    the sky (Garg and Nayar, "Vision and rain", 2007). All slant by at most 20 degrees, within 2 to 3 degrees
    of each other; length, width and light depend on the distance. Distant rain is a veil.
    """
    count = rain.scales[level - 1]
    share = _RAIN_VEIL_SHARE * count / rain.scales[-1]
    veil = np.rint(share * _RAIN_VEIL)
    veiled = cv2.add(cv2.convertScaleAbs(image, alpha=1 - share), (*veil.tolist(), 0.0))
    return screen(veiled, rain_streaks(*image.shape[:2], count, rain_slant(rng), rng))


@register(OPERATIONS, "environment", (100, 280, 560, 1000, 1700), random=True)
def snow(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Falling snow and a bright haze; scale: number of flakes on a square of the shorter side.

    Far flakes are many and small, near ones few, large and out of focus; all are slightly elongated in the
    direction of their fall. Flakes and the light that they scatter only brighten.
    """
    count = snow.scales[level - 1]
    flakes = snow_flakes(*image.shape[:2], count, rng)
    return screen(image, cv2.add(flakes, round(_SNOW_HAZE * count / snow.scales[-1])))


@register(OPERATIONS, "environment", (0.25, 0.4, 0.55, 0.75, 1.0), random=True)
def lens_flare(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Glow, starburst and ghosts of a light in the upper half; scale: strength (at 1 the halo starts white).

    Scatter in the lens makes the glow, diffraction at the aperture's blades the starburst, and pairs of
    reflections at lens surfaces the ghosts: tinted discs and rings on the line through the light and the
    middle of the image (Hullin et al., "Physically-based real-time lens flare rendering", 2011).
    """
    strength, source, size = lens_flare.scales[level - 1], flare_source(rng), image.shape[1::-1]
    light = cv2.resize(flare_glow(*image.shape[:2], source, strength, rng), size)
    ghosts = cv2.resize(flare_ghosts(*image.shape[:2], source, strength, rng), size)
    return screen(image, cv2.add(light, ghosts, dst=light))


def fog_depth(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the depths of a scene in fog on a layer, (h, w) float64 up to 1.

    Patches multiply the depth by factors with a standard deviation of about 0.2.
    """
    rows, columns = layer_size(height, width, _FOG_SIDE_PX)
    patches = np.zeros((rows, columns))
    for side, deviation in ((3, 0.22), (7, 0.11)):
        coarse = rng.normal(0, deviation, layer_size(height, width, side))
        patches += cv2.resize(coarse, (columns, rows), interpolation=cv2.INTER_CUBIC)
    return np.linspace(1, _NEAREST, rows)[:, None] * np.exp(patches)


def rain_slant(rng: np.random.Generator) -> float:
    """Draw the angle between streaks and the vertical in radians; positive goes down to the right."""
    return rng.uniform(-_STEEPEST_SLANT, _STEEPEST_SLANT)


def rain_streaks(height: int, width: int, count: float, slant: float, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` streaks per square of the shorter side, around an angle of `slant`: (H, W) uint8 light."""
    streaks = np.zeros((height, width), np.uint8)
    for (share, side, length, light), layer_rng in zip(_RAIN, _generators(rng, len(_RAIN)), strict=True):
        layer = np.zeros(layer_size(height, width, side), np.uint8)
        drops = layer_rng.random((_number(height, width, share * count), 4))
        middles = drops[:, :2] * layer.shape[::-1]
        half_px = 0.5 * length * min(layer.shape) * (0.6 + 0.8 * drops[:, 2:3])
        angles = slant + _SLANT_SPREAD * math.sqrt(3) * (2 * drops[:, 3] - 1)
        halves = half_px * np.stack([np.sin(angles), np.cos(angles)], axis=1)
        # Streaks fade towards their ends.
        for part, brightness in ((1.0, 0.55), (0.55, 1.0)):
            ends = np.stack([middles - part * halves, middles + part * halves], axis=1)
            lines = np.rint(16 * ends).astype(np.int32)
            cv2.polylines(layer, lines, False, brightness * light, 1, cv2.LINE_AA, shift=4)
        cv2.add(streaks, cv2.resize(layer, (width, height)), dst=streaks)
    return streaks


def snow_flakes(height: int, width: int, count: float, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` flakes per square of the shorter side: (H, W) uint8 light."""
    flakes = np.zeros((height, width), np.uint8)
    fall = math.pi / 2 + rng.uniform(-0.6, 0.6)
    layers = zip(_SNOW, _generators(rng, len(_SNOW)), strict=True)
    for (share, side, radius_px, exponent, light), layer_rng in layers:
        layer = np.zeros(layer_size(height, width, side), np.uint8)
        drawn = layer_rng.random((_number(height, width, share * count), 3))
        rows, columns = (drawn[:, :2] * layer.shape).astype(int).T
        layer[rows, columns] = light * (0.4 + 0.6 * drawn[:, 2])
        shape = _flake(radius_px, exponent, fall)
        layer = cv2.filter2D(layer, -1, shape, borderType=cv2.BORDER_CONSTANT)
        cv2.add(flakes, cv2.resize(layer, (width, height)), dst=flakes)
    return flakes


def flare_source(rng: np.random.Generator) -> tuple[float, float]:
    """Draw where a light is, from the middle; y is negative, for the upper half."""
    angle, distance = rng.uniform(0.1, 0.9) * math.pi, rng.uniform(0.5, 0.9)
    return distance * math.cos(angle), -distance * math.sin(angle)


def flare_glow(
    height: int, width: int, source: tuple[float, float], strength: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw glow and starburst of a light on a layer, (h, w, 3) uint8, with a halo of `strength` x white."""
    rows, columns = layer_size(height, width, _GLOW_SIDE_PX)
    middle_x, middle_y = _position(source, rows, columns)
    side = min(rows, columns)
    x = (np.arange(columns, dtype=np.float32) - middle_x) / side
    y = (np.arange(rows, dtype=np.float32)[:, None] - middle_y) / side
    squared = x**2 + y**2
    halo = 1 / (1 + squared / 0.14**2)
    rays = np.zeros_like(halo)
    first = rng.uniform(0, math.pi)
    for angle in (first, first + math.pi / 3, first + 2 * math.pi / 3):
        aside = x * math.sin(angle) - y * math.cos(angle)
        rays += 1 / (1 + (aside / 0.008) ** 2)
    light = strength * (halo * (0.8 + 1.1 * rays) + 2 * np.exp(-squared / (2 * 0.03**2)))
    warmth = rng.uniform(0, 0.25)
    return cv2.convertScaleAbs(cv2.merge([light * (255 * (1 - part * warmth)) for part in (0, 0.5, 1)]))


def flare_ghosts(
    height: int, width: int, source: tuple[float, float], strength: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw the ghosts of a light on a layer, (h, w, 3) uint8, the brightest with 0.45 of its strength."""
    ghosts = np.zeros((*layer_size(height, width, _GHOST_SIDE_PX), 3), np.uint8)
    rows, columns = ghosts.shape[:2]
    side = min(rows, columns)
    for _ in range(_GHOSTS):
        # At -1 the light is mirrored at the middle; the larger a ghost, the thinner its light is spread.
        along, spread = rng.uniform(-1.6, 0.6), rng.random()
        tint, tone, ring = rng.uniform(0.35, 1, 3), rng.uniform(0.12, 0.45), rng.random() < 0.4
        color = 255 * strength * tone * (1 - 0.6 * spread) * tint / tint.max()
        position = _position((along * source[0], along * source[1]), rows, columns)
        center = tuple(round(16 * coordinate) for coordinate in position)
        radius = round(16 * side * (0.02 + 0.11 * spread**2))
        ghost = np.zeros_like(ghosts)
        cv2.circle(ghost, center, radius, (0.5 * color if ring else color).tolist(), -1, cv2.LINE_AA, 4)
        if ring:
            cv2.circle(ghost, center, radius, color.tolist(), max(1, side // 100), cv2.LINE_AA, 4)
        cv2.add(ghosts, ghost, dst=ghosts)
    return ghosts


def _number(height: int, width: int, density: float) -> int:
    """Return how many things an image holds if a square of its shorter side holds `density`."""
    return max(1, round(density * max(height, width) / min(height, width)))


def _generators(rng: np.random.Generator, number: int) -> list[np.random.Generator]:
    """Return one generator per layer: the first things drawn on it are the same however many follow."""
    return [np.random.default_rng(seed) for seed in rng.integers(2**63, size=number)]


def _position(from_middle: tuple[float, float], rows: int, columns: int) -> tuple[float, float]:
    """Return x and y in px of a layer."""
    return (columns - 1) / 2 * (1 + from_middle[0]), (rows - 1) / 2 * (1 + from_middle[1])


def _flake(radius_px: float, exponent: float, fall: float) -> np.ndarray:
    """Return (side, side) float32 up to 1: a soft disc that falls by its radius."""
    reach = math.ceil(2 * radius_px)
    y, x = np.indices((2 * reach + 1, 2 * reach + 1)) - reach
    fallen_px = radius_px * np.linspace(-0.5, 0.5, 5)[:, None, None]
    squared = (x - fallen_px * math.cos(fall)) ** 2 + (y - fallen_px * math.sin(fall)) ** 2
    discs = np.exp(-0.7 * (squared / radius_px**2) ** exponent).mean(axis=0)
    return (discs / discs.max()).astype(np.float32)
