"""Analog video of the extras: what cable, receiver and tube do to a picture."""

import math

import cv2
import numpy as np

from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

_GAMMA = 2.2
# Distance of a ghost, as a share of the shorter side.
_GHOST_DISTANCE = (0.03, 0.09)
# Periods of scan lines in px for an image of up to 240 rows, as in a tube's field; more for larger images.
_SCAN_PERIODS_PX = (2, 3, 4)
_SCAN_FIELD_ROWS = 240


@register(OPERATIONS, "video", (0.03, 0.06, 0.1, 0.16, 0.24), keeps_layout=False)
def color_bleed(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Color smeared to the right, as by an analog recorder; scale: distance as a share of the width.

    Such a recorder has a seventh of the bandwidth for color that it has for luminance (VHS: about 0.4 and 3
    MHz), and its filters act along the line and only backwards in time. Cr and Cb (BT.601) of a pixel become
    the mean over this share of the width to its left, averaged with the mean over a third of it.
    """
    reach_px = max(3, round(color_bleed.scales[level - 1] * image.shape[1]))
    luminance, *chroma = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb))
    smeared = [
        cv2.addWeighted(_smeared(plane, reach_px), 0.5, _smeared(plane, round(reach_px / 3)), 0.5, 0)
        for plane in chroma
    ]
    return cv2.cvtColor(cv2.merge([luminance, *smeared]), cv2.COLOR_YCrCb2RGB)


@register(OPERATIONS, "video", (0.12, 0.2, 0.28, 0.36, 0.45), random=True, keeps_layout=False)
def ghosting(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """A second, displaced copy of the image; scale: its share of the light.

    Like a signal that arrives twice, the second time by a reflection. The copy is 3 to 9 % of the shorter
    side away in a random direction; the sum is scaled to keep white. The first copy is always brighter.
    """
    share = ghosting.scales[level - 1]
    distance = rng.uniform(*_GHOST_DISTANCE) * min(image.shape[:2])
    angle = rng.uniform(0, 2 * math.pi)
    across, down = round(distance * math.cos(angle)), round(distance * math.sin(angle))
    if across == down == 0:
        across = 1
    return cv2.addWeighted(image, 1 - share, displaced(image, across, down), share, 0)


@register(OPERATIONS, "video", (0.15, 0.3, 0.48, 0.68, 0.9), random=True)
def scan_lines(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Lines of a picture tube; scale: share of the light missing between them.

    The beam's cross-section leaves dark gaps between its lines. Along a column the light follows a raised
    cosine with a random phase and a period of 2 to 4 px, longer in proportion where the image has over 240
    rows. Values are light to the power of 1 / 2.2.
    """
    rows = image.shape[0]
    enlarged = max(1, round(rows / _SCAN_FIELD_ROWS))
    period_px = enlarged * _SCAN_PERIODS_PX[rng.integers(len(_SCAN_PERIODS_PX))]
    first = int(rng.integers(period_px))
    values = np.arange(256)
    result = np.empty_like(image, order="C")
    for row in range(period_px):
        gap = 0.5 - 0.5 * math.cos(2 * math.pi * (row + first) / period_px)
        gain = (1 - scan_lines.scales[level - 1] * gap) ** (1 / _GAMMA)
        table = np.rint(gain * values).astype(np.uint8)
        result[row::period_px] = cv2.LUT(image[row::period_px], table)
    return result


def displaced(image: np.ndarray, across: int, down: int) -> np.ndarray:
    """Return (H, W, 3) uint8 moved by whole px to the right and down (or left and up), edges reflected."""
    height, width = image.shape[:2]
    visible = image[max(0, -down) : height - max(0, down), max(0, -across) : width - max(0, across)]
    margins = (max(0, down), max(0, -down), max(0, across), max(0, -across))
    return cv2.copyMakeBorder(visible, *margins, cv2.BORDER_REFLECT_101)


def _smeared(plane: np.ndarray, reach_px: int) -> np.ndarray:
    """Return the mean of each sample of (H, W) uint8 and those to its left, `reach_px` in all."""
    last = (reach_px - 1, 0)
    return cv2.boxFilter(plane, -1, (reach_px, 1), anchor=last, borderType=cv2.BORDER_REFLECT_101)
