"""Synthetic scenes with the statistics of natural pictures, for the demo data: dead leaves.

A scene is a pile of opaque leaves (pebbles, petals) whose radii follow a power law with exponent -3. This is
the simplest image model with the scale invariance, the sharp edges and the occlusions of photographs (Lee,
Mumford and Huang, 2001). Leaves are shaded, have grain at several scales, and cast short shadows.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

# Scenes are drawn at twice the final size and averaged down, so that edges are smooth.
SUPERSAMPLING = 2
# Range of the smallest leaves' radius in the final image: some scenes are busy, some are calm.
SMALLEST_RADIUS_PX = (1.8, 6.0)
LARGEST_RADIUS_SHARE = 0.4
# How often a point is covered on average; exp(-3.5) = 3 % of the ground stays visible.
COVERAGE = 3.5
_OUTLINE_POINTS = 20
_GRAIN_SIDE = 256
_GRAIN_SLOPES = (0.7, 1.0, 1.4, 1.8)


@dataclass(frozen=True)
class SceneKind:
    """What distinguishes one kind of scene from another."""

    hues: tuple[float, ...]  # centers, in turns of the color circle (0 red, 1/3 green, 2/3 blue)
    saturation: tuple[float, float]  # range of the HSV saturation
    elongation: tuple[float, float]  # range of the ratio of the short to the long half axis
    pointedness: float  # 1 draws ellipses, 2 draws leaves with two pointed ends
    relief: float  # 0 shades leaves as flat cards, 1 as pebbles
    grain: float  # contrast of the leaves' texture (standard deviation of log radiance)


KINDS: dict[str, SceneKind] = {
    "foliage": SceneKind((0.22, 0.27, 0.31, 0.13), (0.25, 0.7), (0.3, 0.6), 2.0, 0.35, 0.22),
    "autumn": SceneKind((0.03, 0.07, 0.11, 0.14), (0.3, 0.75), (0.4, 0.8), 1.7, 0.3, 0.22),
    "pebbles": SceneKind((0.06, 0.1, 0.58), (0.03, 0.3), (0.6, 1.0), 1.0, 0.9, 0.3),
    "petals": SceneKind((0.93, 0.98, 0.78, 0.28), (0.15, 0.7), (0.5, 0.95), 1.3, 0.5, 0.14),
    "dusk": SceneKind((0.57, 0.62, 0.68, 0.08), (0.15, 0.55), (0.4, 1.0), 1.2, 0.6, 0.2),
}


def draw_scene(rng: np.random.Generator, kind: str, height_px: int, width_px: int) -> np.ndarray:
    """Draw one scene of a kind in `KINDS`.

    Returns:
        (height_px, width_px, 3) float32 linear RGB radiance, not negative, 1.0 about the 99th percentile.
    """
    look = KINDS[kind]
    height, width = height_px * SUPERSAMPLING, width_px * SUPERSAMPLING
    leaves = _draw_leaves(rng, look, height, width)
    ids = _pile(leaves, height, width)
    radiance = _shade(rng, look, leaves, ids)
    radiance = cv2.resize(radiance, (width_px, height_px), interpolation=cv2.INTER_AREA)
    return radiance / max(float(np.quantile(radiance, 0.99)), 1e-6)


def _draw_leaves(rng: np.random.Generator, look: SceneKind, height: int, width: int) -> dict[str, np.ndarray]:
    """Draw position, shape and color of all leaves; entry 0 is the ground, entry 1 the lowest leaf."""
    smallest = SUPERSAMPLING * np.exp(rng.uniform(*np.log(SMALLEST_RADIUS_PX)))
    largest = LARGEST_RADIUS_SHARE * min(height, width)
    aspect_mean = sum(look.elongation) / 2
    radius_squared = 2 * np.log(largest / smallest) / (smallest**-2 - largest**-2)
    count = 1 + int(COVERAGE * height * width / (np.pi * radius_squared * aspect_mean))
    share = rng.random(count)
    radius = (smallest**-2 + share * (largest**-2 - smallest**-2)) ** -0.5
    radius[0] = max(height, width)
    hue = rng.choice(np.array(look.hues), count) + rng.normal(0, 0.015, count)
    saturation = rng.uniform(*look.saturation, count)
    # Albedos of natural surfaces span about a factor of ten, evenly on a logarithmic axis.
    value = np.exp(rng.uniform(np.log(0.12), np.log(0.95), count))
    return {
        "x": rng.uniform(0, width, count).astype(np.float32),
        "y": rng.uniform(0, height, count).astype(np.float32),
        "long": radius.astype(np.float32),
        "short": (radius * rng.uniform(*look.elongation, count)).astype(np.float32),
        "angle": rng.uniform(0, 2 * np.pi, count).astype(np.float32),
        "albedo": _hsv_to_rgb(hue, saturation, value),
        "relief": (look.relief * rng.uniform(0.5, 1.0, count)).astype(np.float32),
        "grain": (look.grain * rng.uniform(0.3, 1.4, count)).astype(np.float32),
        "bank": rng.integers(0, len(_GRAIN_SLOPES), count).astype(np.int32),
        "offset": rng.integers(0, _GRAIN_SIDE, (count, 2)).astype(np.float32),
        "pointedness": np.full(count, look.pointedness, np.float32),
    }


def _pile(leaves: dict[str, np.ndarray], height: int, width: int) -> np.ndarray:
    """Paint the leaves over one another; returns (height, width) int32, the topmost leaf of each pixel."""
    turn = np.linspace(0, 2 * np.pi, _OUTLINE_POINTS, endpoint=False)
    along = np.cos(turn) * leaves["long"][:, None]
    across = np.sign(np.sin(turn)) * np.abs(np.sin(turn)) ** leaves["pointedness"][:, None]
    across = across * leaves["short"][:, None]
    cos, sin = np.cos(leaves["angle"])[:, None], np.sin(leaves["angle"])[:, None]
    outline_x = leaves["x"][:, None] + along * cos - across * sin
    outline_y = leaves["y"][:, None] + along * sin + across * cos
    outlines = np.rint(np.stack([outline_x, outline_y], axis=-1)).astype(np.int32)
    ids = np.zeros((height, width), np.int32)
    for leaf in range(1, len(outlines)):
        cv2.fillConvexPoly(ids, outlines[leaf], leaf)
    return ids


def _shade(
    rng: np.random.Generator, look: SceneKind, leaves: dict[str, np.ndarray], ids: np.ndarray
) -> np.ndarray:
    """Light the pile from one side; returns (H, W, 3) float32 radiance at the supersampled size."""
    height, width = ids.shape
    cos, sin = np.cos(leaves["angle"])[ids], np.sin(leaves["angle"])[ids]
    dx = np.arange(width, dtype=np.float32)[None, :] - leaves["x"][ids]
    dy = np.arange(height, dtype=np.float32)[:, None] - leaves["y"][ids]
    along, across = dx * cos + dy * sin, dy * cos - dx * sin

    # Texture is fixed to the leaf: it turns with it, and each leaf's is cut from another part of the bank.
    row = (along + leaves["offset"][:, 0][ids]).astype(np.int32) & (_GRAIN_SIDE - 1)
    column = (across + leaves["offset"][:, 1][ids]).astype(np.int32) & (_GRAIN_SIDE - 1)
    texture = _grain_bank()[leaves["bank"][ids], row, column] * leaves["grain"][ids]

    # Half of a pebble's normal: the light comes from one side and a little from the front.
    slope_x = along / leaves["long"][ids] * cos - across / leaves["short"][ids] * sin
    slope_y = along / leaves["long"][ids] * sin + across / leaves["short"][ids] * cos
    light = rng.uniform(0, 2 * np.pi)
    toward = np.clip(slope_x * np.float32(np.cos(light)) + slope_y * np.float32(np.sin(light)), -1, 1)
    shade = 1 + leaves["relief"][ids] * 0.75 * toward

    reach = int(rng.integers(2, 6))
    # A shadow falls where the next leaf on the side of the light is higher.
    shift = np.float32([[1, 0, -reach * np.cos(light)], [0, 1, -reach * np.sin(light)]])
    options = {"flags": cv2.INTER_NEAREST, "borderMode": cv2.BORDER_REPLICATE}
    higher = cv2.warpAffine(ids.astype(np.float32), shift, (width, height), **options)
    shadow = cv2.GaussianBlur((higher > ids).astype(np.float32), (0, 0), 0.5 * reach)
    coarse = rng.normal(0, 0.35, (4, 4)).astype(np.float32)
    light_field = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    lightness = np.exp(texture + light_field) * shade * (1 - rng.uniform(0.3, 0.6) * shadow)
    return leaves["albedo"][ids] * lightness[..., None]


@lru_cache(maxsize=1)
def _grain_bank() -> np.ndarray:
    """Return noise tiles, (slopes, side, side) float32, amplitude 1 / f^slope, mean 0, deviation 1."""
    rng = np.random.default_rng(20260)
    frequency = np.hypot(np.fft.fftfreq(_GRAIN_SIDE)[:, None], np.fft.rfftfreq(_GRAIN_SIDE)[None, :])
    # Below 1/24 cycle per pixel, texture would be shading, which is drawn separately.
    frequency = np.maximum(frequency, 1 / 24)
    tiles = []
    for slope in _GRAIN_SLOPES:
        spectrum = np.fft.rfft2(rng.normal(size=(_GRAIN_SIDE, _GRAIN_SIDE))) / frequency**slope
        tile = np.fft.irfft2(spectrum, s=(_GRAIN_SIDE, _GRAIN_SIDE))
        tiles.append((tile - tile.mean()) / tile.std())
    return np.array(tiles, dtype=np.float32)


def _hsv_to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Convert (n,) HSV (hue in turns, the rest 0 .. 1) to (n, 3) float32 RGB."""
    sector = (hue[:, None] * 6 + np.array([5.0, 3.0, 1.0])) % 6
    chroma = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return (value[:, None] * (1 - saturation[:, None] * chroma)).astype(np.float32)
