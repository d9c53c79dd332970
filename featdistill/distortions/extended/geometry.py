"""Geometry of the extended library: the image is bent, turned or seen from the side.

Every operation is a map of the plane. The maps are functions of their own: one that bends gives for each
pixel of the result the place in the image that it shows; one that keeps straight lines straight gives the
matrix that takes a place of the image to its place in the result. Places are x and y in px, (0, 0) being the
middle of the upper left pixel, and the middle of the frame stays where it is. The image is sampled
bilinearly. Where a map looks beyond the frame it finds the image reflected at its outermost pixels; barrel
and pincushion never do.
"""

import math

import cv2
import numpy as np

from featdistill.distortions.kernels.scratch import kept
from featdistill.distortions.kernels.warps import project, resample
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

# Displacements are drawn on a grid of so many cells along the shorter side, then smoothed with a Gaussian of
# so many cells: their correlation falls to 1 / e over twice that, 7 / 32 of the shorter side.
_CELLS = 16
_SMOOTHING_CELLS = 1.75
# Distance of the camera, in longer sides: these fill 44 degrees of its view, about those of a normal lens.
_DISTANCE = 1.25
_ZOOM_PER_DEGREE = 0.012


@register(OPERATIONS, "geometry", (0.006, 0.011, 0.017, 0.024, 0.032), random=True, keeps_layout=False)
def elastic(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth random displacement with an RMS of this share of the shorter side.

    As of a print on rubber: a Gaussian random field of displacements (Simard et al., 2003) whose correlation
    falls to 1 / e over 7 / 32 of the shorter side. It is smooth enough for lines to wobble without folding
    over. What lies beyond the picture is its reflection.
    """
    height, width = image.shape[:2]
    rms_px = elastic.scales[level - 1] * min(height, width)
    sources = elastic_displacement(height, width, rms_px, rng)
    sources[..., 0] += np.arange(width, dtype=np.float32)
    sources[..., 1] += np.arange(height, dtype=np.float32)[:, None]
    return resample(image, sources)


@register(OPERATIONS, "geometry", (6, 13, 20, 28, 37), random=True, keeps_layout=False)
def perspective_warp(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """A flat picture that is turned by so many degrees about a random axis and seen by a camera.

    As of a print or a screen that is photographed from the side. The axis lies in the picture and goes
    through its middle, in any direction (so the picture turns about two axes at once), and the camera stands
    1.25 longer sides away: the near half grows, the far half shrinks, and the camera zooms in so far that the
    middle keeps its area. What lies beyond the picture is its reflection.
    """
    tilt = math.radians(perspective_warp.scales[level - 1])
    matrix = tilt_matrix(*image.shape[:2], tilt, rng.uniform(0, 2 * math.pi))
    return project(image, matrix)


@register(OPERATIONS, "geometry", (0.05, 0.1, 0.18, 0.3, 0.5), keeps_layout=False)
def barrel(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Barrel distortion of a wide-angle lens: a coefficient k1 > 0 of Brown's radial model.

    The light of radius r (1 in the corners) is what an ideal lens would show at r (1 + k1 r^2), as in Brown's
    "Close-range camera calibration" (1971). The result is enlarged so that the corners keep their place.
    """
    return resample(image, radial_sources(*image.shape[:2], barrel.scales[level - 1]))


@register(OPERATIONS, "geometry", (-0.03, -0.07, -0.12, -0.18, -0.25), keeps_layout=False)
def pincushion(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Pincushion distortion of a telephoto lens: a coefficient k1 < 0 of Brown's radial model.

    As `barrel`, the other way round. The result is enlarged so that the middles of the longer sides keep
    their place, and with that the whole frame is filled.
    """
    return resample(image, radial_sources(*image.shape[:2], pincushion.scales[level - 1]))


@register(OPERATIONS, "geometry", (2, 4.5, 8, 13, 20), random=True, keeps_layout=False)
def rotate_scale(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Rotation by up to so many degrees, either way, and a zoom by up to 1.2 % a degree, in or out.

    As of a picture that was scanned or held askew. Both are drawn between a half and the whole of their
    limits. What lies beyond the picture is its reflection.
    """
    most = rotate_scale.scales[level - 1]
    angle = math.radians(most * _either_way(rng) * rng.uniform(0.5, 1))
    zoom = math.exp(_ZOOM_PER_DEGREE * most * _either_way(rng) * rng.uniform(0.5, 1))
    return project(image, rotation_matrix(*image.shape[:2], angle, zoom))


@register(OPERATIONS, "geometry", (3, 6, 10, 16, 24), random=True, keeps_layout=False)
def shear(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Vertical or horizontal lines lean by so many degrees, to either side; the other lines stay.

    As rolling shutters and sheet scanners do to what moves. What lies beyond the picture is its reflection.
    """
    angle = math.radians(shear.scales[level - 1]) * _either_way(rng)
    return project(image, shear_matrix(*image.shape[:2], angle, vertical=rng.random() < 0.5))


def elastic_displacement(height: int, width: int, rms_px: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a smooth random field of displacements.

    Args:
        height: of the image.
        width: of the image.
        rms_px: root of the mean squared length of the displacements; the field is scaled to it.

    Returns:
        (H, W, 2) float32 displacements in x and in y, in px, in memory that is kept: the next call overwrites
        it.
    """
    cell_px = min(height, width) / _CELLS
    margin = math.ceil(3 * _SMOOTHING_CELLS)
    grid = math.ceil(height / cell_px), math.ceil(width / cell_px)
    noise = rng.normal(size=(grid[0] + 2 * margin, grid[1] + 2 * margin, 2))
    side = 2 * margin + 1
    smooth = cv2.GaussianBlur(noise, (side, side), _SMOOTHING_CELLS)[margin:-margin, margin:-margin]
    smooth *= rms_px / np.sqrt(2 * np.mean(smooth**2))
    field = kept("field", (height, width, 2), np.float32)
    return cv2.resize(smooth.astype(np.float32), (width, height), dst=field, interpolation=cv2.INTER_CUBIC)


def radial_sources(height: int, width: int, k1: float) -> np.ndarray:
    """Return where a lens of Brown's radial model looks, enlarged so that it looks only into the frame.

    Args:
        height: of the image.
        width: of the image.
        k1: coefficient where the radius is 1 in the corners; above 0 for a barrel, between -1/3 and 0 for a
            pincushion.

    Returns:
        (H, W, 2) float32 x and y in px, in memory that is kept: the next call overwrites it.
    """
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    corner_squared = middle_x**2 + middle_y**2
    # The places that the enlarged frame touches: its corners if they are drawn in, else the nearest edges.
    touching = 1.0 if k1 > 0 else min(middle_x, middle_y) ** 2 / corner_squared
    x = np.arange(width, dtype=np.float32) - np.float32(middle_x)
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32(middle_y)
    scale = 1 / (1 + k1 * touching)
    bend = scale * k1 / corner_squared
    across, down = (kept(name, (height, width), np.float32) for name in ("across", "down"))
    factor = np.add(np.float32(bend) * x**2, np.float32(bend) * y**2 + np.float32(scale), out=across)
    np.multiply(factor, y, out=down)
    np.multiply(factor, x, out=across)
    np.add(across, np.float32(middle_x), out=across)
    np.add(down, np.float32(middle_y), out=down)
    return cv2.merge([across, down], kept("field", (height, width, 2), np.float32))


def tilt_matrix(height: int, width: int, tilt: float, direction: float) -> np.ndarray:
    """Return the homography of a picture that is turned about an axis through its middle.

    Args:
        height: of the image.
        width: of the image.
        tilt: angle of the turn, in radians.
        direction: of the axis in the picture, in radians from the x axis towards growing row numbers.

    Returns:
        (3, 3) float64.
    """
    across = np.array([-math.sin(direction), math.cos(direction)])
    matrix = np.eye(3)
    # What lies along the axis stays; what lies across it shortens and moves away from the camera or nearer.
    matrix[:2, :2] += (math.cos(tilt) - 1) * np.outer(across, across)
    matrix[:2, :2] /= math.cos(tilt) ** 0.5
    matrix[2, :2] = math.sin(tilt) / (_DISTANCE * max(height, width)) * across
    return _about_the_middle(matrix, height, width)


def rotation_matrix(height: int, width: int, angle: float, zoom: float) -> np.ndarray:
    """Return the (3, 3) float64 matrix of a turn by radians, from the x axis to the y axis, and a zoom."""
    cosine, sine = zoom * math.cos(angle), zoom * math.sin(angle)
    return _about_the_middle(np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]), height, width)


def shear_matrix(height: int, width: int, angle: float, vertical: bool) -> np.ndarray:
    """Return the (3, 3) float64 matrix by which vertical (else horizontal) lines lean by radians."""
    matrix = np.eye(3)
    matrix[(0, 1) if vertical else (1, 0)] = math.tan(angle)
    return _about_the_middle(matrix, height, width)


def _about_the_middle(matrix: np.ndarray, height: int, width: int) -> np.ndarray:
    """Move the origin of a homography from (0, 0) to the middle of the frame."""
    to_middle = np.array([[1, 0, (width - 1) / 2], [0, 1, (height - 1) / 2], [0, 0, 1]])
    return to_middle @ matrix @ np.linalg.inv(to_middle)


def _either_way(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0
