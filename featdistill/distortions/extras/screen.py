"""Screens of the extras: printed dots, and photographs of displays."""

import math
from functools import cache

import cv2
import numpy as np

from featdistill.distortions.kernels.noise_tables import middle_shares
from featdistill.distortions.kernels.warps import frame_corners, project
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

# The step from a dot of ink to the next along its row, in px (right, down), by level. Whole px let the
# pattern repeat in a small tile. The angles, 11 to 18 degrees, are near to the usual 15 of cyan.
_DOT_STEPS = ((3, 1), (4, 1), (5, 1), (6, 2), (7, 2))
# The rim of a dot is a ramp of about this width.
_DOT_RIM_PX = 1.8
_MIDDLE = 127.5

# Gains are coded in 128ths: up to 1.99.
_UNIT = 128
# Bands of a moire: periods as shares of the shorter side, and the largest number of cycles that the lens adds
# or removes up to the edges. 70 % of the contrast is colored: a display has its three colors along rows only.
_BAND_PERIODS = (0.07, 0.2)
_MAX_BENDING = 2.5
_COLORED_SHARE = 0.7

# A photograph of a screen at a strength of 1: corners moved in by up to this share of the sides, contrast of
# sub-pixels, of rows and of the moire, loss of backlight across the screen, and reflected light.
_CORNERS_IN = 0.07
_SUB_PIXELS = 0.4
_ROWS = 0.15
_CAPTURED_MOIRE = 0.12
_BACKLIGHT_LOSS = 0.3
_REFLECTION = 0.12
_GAMMA_RISE = 0.3
_SCREEN_PIXEL_PX = (2.4, 3.4)


@register(OPERATIONS, "screen", (3.2, 4.1, 5.1, 6.3, 7.3), random=True)
def halftone(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Printed dots of cyan, magenta and yellow ink; scale: their distance in px.

    Each ink is printed in full or not at all, in dots on a square grid whose size follows the tone: there is
    ink where the value is below the local threshold. The lens makes rims of about 1.8 px, which blurs fine
    dots. The mean of a tone is kept. The grids of cyan and magenta are rotated by 11 to 18 degrees and by the
    complement, yellow's is not; all are randomly shifted.
    """
    height, width = image.shape[:2]
    right, down = _DOT_STEPS[level - 1]
    pitch_px = math.hypot(right, down)
    slope = pitch_px / (math.sqrt(2) * _DOT_RIM_PX)
    planes = []
    for step in ((right, down), (down, right), (round(pitch_px), 0)):
        tile = dot_thresholds(*step, slope)
        side = len(tile)
        tile = np.roll(tile, rng.integers(side, size=2), axis=(0, 1))
        planes.append(np.tile(tile, (-(-height // side), -(-width // side)))[:height, :width])
    tones = cv2.LUT(image, _tone_for_mean(slope))
    return cv2.addWeighted(tones, slope, cv2.merge(planes), -slope, _MIDDLE)


@register(OPERATIONS, "screen", (0.06, 0.12, 0.2, 0.3, 0.42), random=True)
def moire(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Colored bands where a display's grid interferes with the camera's; scale: contrast.

    The display's pixels are about as large as the camera's and its grid is slightly rotated (see
    `grid_phases`): sampled at every px, the difference shows as wide bands, bent by the lens. The display's
    columns of red, green and blue are a third of its period apart, as are their bands; its rows add gray
    bands.
    """
    gains = moire_gains(*image.shape[:2], moire.scales[level - 1], rng)
    return cv2.multiply(image, gains, scale=1 / _UNIT)


@register(OPERATIONS, "screen", (0.2, 0.4, 0.6, 0.8, 1.0), random=True, keeps_layout=False)
def screen_capture(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Photograph of a display: perspective, sub-pixels, backlight, moire, glare; scale: strength.

    At a strength of 1 each corner of the frame is up to 7 % of the sides inside the display. Its pixels have
    2.4 to 3.4 px, with stripes of red, green and blue and thin gaps between rows; the backlight falls by up
    to 30 % to one side. Reflected light lifts black to 12 % of white, and the camera's curve steepens
    mid-tones by a power of 1.3. All of this is proportional to the strength.
    """
    strength = screen_capture.scales[level - 1]
    height, width = image.shape[:2]
    inwards = _CORNERS_IN * strength * rng.random((4, 2))
    corners = np.abs(np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) - inwards) * (width - 1, height - 1)
    gains = display_gains(height, width, strength, rng)
    bands = moire_gains(height, width, _CAPTURED_MOIRE * strength, rng)
    cv2.multiply(gains, bands, dst=gains, scale=1 / _UNIT)
    shown = cv2.multiply(image, gains, scale=1 / _UNIT, dst=gains)
    matrix = cv2.getPerspectiveTransform(corners.astype(np.float32), frame_corners(height, width))
    return cv2.LUT(project(shown, matrix), _camera_curve(strength))


@cache
def dot_thresholds(right: int, down: int, slope: float) -> np.ndarray:
    """Return a tile of thresholds for a grid of dots, (right, down) px from one to the next in its row.

    The (side, side) uint8 are spread as evenly as their few different values allow. At any slope of the ramp
    from ink to paper (1 or more), black is all ink and white all paper.
    """
    square = right**2 + down**2
    side = square // math.gcd(right, down)
    y, x = np.indices((side, side))
    turn = 2 * np.pi / square
    spots = np.cos(turn * (right * x + down * y)) + np.cos(turn * (right * y - down * x))
    # Rounded, because equal heights would differ by rounding errors. They share the middle of their ranks.
    _, which, counts = np.unique(np.round(spots, 9), return_inverse=True, return_counts=True)
    ranks = ((np.cumsum(counts) - counts / 2) / spots.size)[which.reshape(spots.shape)]
    return np.rint(_MIDDLE + (2 * ranks - 1) * (_MIDDLE - _MIDDLE / slope)).astype(np.uint8)


def grid_phases(
    height: int, width: int, per_px: tuple[float, float], bends: tuple[float, float]
) -> np.ndarray:
    """Return the phase of a grid at every px, (H, W) uint8 in 256ths of a period.

    It has `per_px` periods per px, to the right and down; near integers the beat is visible. Towards the
    edges, `bends` periods are missing (or added, if negative), along x and y.
    """
    parts = []
    for side, frequency, bend in ((height, per_px[1], bends[1]), (width, per_px[0], bends[0])):
        periods = frequency * np.arange(side) - bend * np.linspace(-1, 1, side) ** 2
        parts.append(np.floor(256 * (periods % 1)).astype(np.int64).astype(np.uint8))
    # Sums of bytes are sums of phases, as both wrap around.
    return parts[0][:, None] + parts[1]


def moire_gains(height: int, width: int, contrast: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the gains of a moire's bands, (H, W, 3) uint8 in 128ths, within `contrast` (up to 0.7) of 1."""
    shorter = min(height, width)
    phases = []
    for is_columns in (True, False):
        cycles, angle = 1 / (shorter * rng.uniform(*_BAND_PERIODS)), rng.uniform(0, 2 * math.pi)
        across, down = cycles * math.cos(angle), cycles * math.sin(angle)
        per_px = (1 + across, down) if is_columns else (across, 1 + down)
        bends = rng.uniform(-_MAX_BENDING, _MAX_BENDING, 2)
        phases.append(grid_phases(height, width, per_px, bends))
    wave = 2 * np.pi * np.arange(256) / 256
    gray = cv2.LUT(phases[1], _coded(0.5 + (1 - _COLORED_SHARE) * contrast * np.cos(wave)))
    channels = []
    for color in range(3):
        gain = 0.5 + _COLORED_SHARE * contrast * np.cos(wave + 2 * np.pi * color / 3)
        channels.append(cv2.add(cv2.LUT(phases[0], _coded(gain)), gray))
    return cv2.merge(channels)


def display_gains(height: int, width: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the gains of a display's sub-pixels, rows and backlight: (H, W, 3) uint8 in 128ths."""
    period_px, (first_x, first_y) = rng.uniform(*_SCREEN_PIXEL_PX), rng.random(2)
    x, y = np.arange(width), np.arange(height)
    columns = 2 * np.pi * (x[:, None] / period_px + first_x + np.arange(3) / 3)
    rows = 2 * np.pi * (y / period_px + first_y)
    # The backlight rises evenly from one corner to full in the opposite one.
    angle, loss = rng.uniform(0, 2 * math.pi), _BACKLIGHT_LOSS * strength
    towards = np.array([math.cos(angle), math.sin(angle)])
    rise_x, rise_y = (
        np.linspace(max(0, -rise), max(0, rise), side)
        for rise, side in zip(loss * towards / np.abs(towards).sum(), (width, height), strict=True)
    )
    # Split so that neither part is negative.
    of_x = 0.75 - loss + _SUB_PIXELS * strength * np.cos(columns) + rise_x[:, None]
    of_y = 0.25 + _ROWS * strength * np.cos(rows) + rise_y
    return _coded(of_y)[:, None, None] + _coded(of_x)


def _coded(gains: np.ndarray) -> np.ndarray:
    return np.rint(_UNIT * gains).astype(np.uint8)


@cache
def _tone_for_mean(slope: float) -> np.ndarray:
    """Return, by value, the tone whose print has this value on average."""
    tones = np.linspace(0, 255, 2041)
    thresholds = _MIDDLE + (2 * middle_shares(1024) - 1) * (_MIDDLE - _MIDDLE / slope)
    means = np.clip(slope * (tones[:, None] - thresholds) + _MIDDLE, 0, 255).mean(axis=1)
    return np.rint(np.interp(np.arange(256), means, tones)).astype(np.uint8)


@cache
def _camera_curve(strength: float) -> np.ndarray:
    value = np.arange(256) / 255
    reflection = _REFLECTION * strength
    seen = reflection + (1 - reflection) * value ** (1 + _GAMMA_RISE * strength)
    return np.rint(255 * seen).astype(np.uint8)
