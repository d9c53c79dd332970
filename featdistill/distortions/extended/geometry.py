"""Geometry of the extended library: the image is bent, turned or seen from the side.

Every operation is a map of the plane, in a function of its own. A map that bends returns, for each pixel of
the result, where in the image it comes from; one that keeps straight lines straight returns the matrix from
the image to the result. Positions are x and y in px, with (0, 0) in the middle of the upper left pixel, and
the middle of the frame is a fixed point. The image is sampled bilinearly and reflected beyond its frame
(which barrel and pincushion never need).
"""

import math

import cv2
import numpy as np

from featdistill.distortions.kernels.scratch import scratch_array
from featdistill.distortions.kernels.warps import project, resample
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

# Displacements are drawn on a grid with this many cells along the shorter side, then smoothed with a Gaussian
# of `_SMOOTHING_CELLS`: their correlation falls to 1 / e over twice that, 7 / 32 of the shorter side.
_CELLS = 16
_SMOOTHING_CELLS = 1.75
# Distance of the camera, in longer sides: these fill 44 degrees of its view, as with a normal lens.
_DISTANCE = 1.25
_ZOOM_PER_DEGREE = 0.012


@register(OPERATIONS, "geometry", (0.006, 0.011, 0.017, 0.024, 0.032), random=True, keeps_layout=False)
def elastic(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth random displacement, like a print on rubber; scale: RMS as a share of the shorter side.

    A Gaussian random field of displacements (Simard et al., 2003), too smooth for lines to fold over.
    """
    height, width = image.shape[:2]
    rms_px = elastic.scales[level - 1] * min(height, width)
    sources = elastic_displacement(height, width, rms_px, rng)
    sources[..., 0] += np.arange(width, dtype=np.float32)
    sources[..., 1] += np.arange(height, dtype=np.float32)[:, None]
    return resample(image, sources)


@register(OPERATIONS, "geometry", (6, 13, 20, 28, 37), random=True, keeps_layout=False)
def perspective_warp(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """A print or screen photographed from the side; scale: tilt in degrees about a random axis.

    The axis is in the picture and goes through its middle. The camera is 1.25 longer sides away: the near
    half grows, the far half shrinks, and the camera zooms such that the middle keeps its area.
    """
    tilt = math.radians(perspective_warp.scales[level - 1])
    matrix = tilt_matrix(*image.shape[:2], tilt, rng.uniform(0, 2 * math.pi))
    return project(image, matrix)


@register(OPERATIONS, "geometry", (0.05, 0.1, 0.18, 0.3, 0.5), keeps_layout=False)
def barrel(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Barrel distortion of a wide-angle lens; scale: k1 > 0 of Brown's radial model.

    At radius r (1 in the corners) the lens shows what an ideal one would show at r (1 + k1 r^2) (Brown,
    "Close-range camera calibration", 1971). The result is enlarged until the corners are in place again.
    """
    return resample(image, radial_sources(*image.shape[:2], barrel.scales[level - 1]))


@register(OPERATIONS, "geometry", (-0.03, -0.07, -0.12, -0.18, -0.25), keeps_layout=False)
def pincushion(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Pincushion distortion of a telephoto lens; scale: k1 < 0 of Brown's radial model.

    The reverse of `barrel`, enlarged until the middles of the longer sides are in place.
    """
    return resample(image, radial_sources(*image.shape[:2], pincushion.scales[level - 1]))


@register(OPERATIONS, "geometry", (2, 4.5, 8, 13, 20), random=True, keeps_layout=False)
def rotate_scale(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Rotation and zoom in either direction; scale: largest angle in degrees (zoom: 1.2 % per degree).

    Like a picture that was scanned or held askew. Both are drawn between half and all of their limits.
    """
    limit = rotate_scale.scales[level - 1]
    angle = math.radians(limit * _either_sign(rng) * rng.uniform(0.5, 1))
    zoom = math.exp(_ZOOM_PER_DEGREE * limit * _either_sign(rng) * rng.uniform(0.5, 1))
    return project(image, rotation_matrix(*image.shape[:2], angle, zoom))


@register(OPERATIONS, "geometry", (3, 6, 10, 16, 24), random=True, keeps_layout=False)
def shear(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Shear: vertical or horizontal lines lean to either side; scale: angle in degrees.

    As rolling shutters and sheet scanners do to moving objects.
    """
    angle = math.radians(shear.scales[level - 1]) * _either_sign(rng)
    return project(image, shear_matrix(*image.shape[:2], angle, vertical=rng.random() < 0.5))


def elastic_displacement(height: int, width: int, rms_px: float, rng: np.random.Generator) -> np.ndarray:
    """Draw smooth displacements of root mean squared length `rms_px`: (H, W, 2) float32 scratch memory."""
    cell_px = min(height, width) / _CELLS
    margin = math.ceil(3 * _SMOOTHING_CELLS)
    grid = math.ceil(height / cell_px), math.ceil(width / cell_px)
    noise = rng.normal(size=(grid[0] + 2 * margin, grid[1] + 2 * margin, 2))
    side = 2 * margin + 1
    smooth = cv2.GaussianBlur(noise, (side, side), _SMOOTHING_CELLS)[margin:-margin, margin:-margin]
    smooth *= rms_px / np.sqrt(2 * np.mean(smooth**2))
    field = scratch_array("field", (height, width, 2), np.float32)
    return cv2.resize(smooth.astype(np.float32), (width, height), dst=field, interpolation=cv2.INTER_CUBIC)


def radial_sources(height: int, width: int, k1: float) -> np.ndarray:
    """Return where a lens of Brown's radial model looks, enlarged until it looks only into the frame.

    `k1` is for a radius of 1 in the corners: positive for a barrel, between -1/3 and 0 for a pincushion. The
    result is (H, W, 2) float32 x and y in px, in scratch memory.
    """
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    corner_squared = middle_x**2 + middle_y**2
    # Squared radius of what the enlarged frame touches: its corners for a barrel, else the nearest edges.
    touching = 1.0 if k1 > 0 else min(middle_x, middle_y) ** 2 / corner_squared
    x = np.arange(width, dtype=np.float32) - np.float32(middle_x)
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32(middle_y)
    scale = 1 / (1 + k1 * touching)
    bend = scale * k1 / corner_squared
    across, down = (scratch_array(name, (height, width), np.float32) for name in ("across", "down"))
    factor = np.add(np.float32(bend) * x**2, np.float32(bend) * y**2 + np.float32(scale), out=across)
    np.multiply(factor, y, out=down)
    np.multiply(factor, x, out=across)
    np.add(across, np.float32(middle_x), out=across)
    np.add(down, np.float32(middle_y), out=down)
    return cv2.merge([across, down], scratch_array("field", (height, width, 2), np.float32))


def tilt_matrix(height: int, width: int, tilt: float, direction: float) -> np.ndarray:
    """Return the (3, 3) float64 homography of a picture turned by `tilt` about an axis through its middle.

    `direction` is the angle from the x axis to that axis, towards growing row numbers. Both are in radians.
    """
    across = np.array([-math.sin(direction), math.cos(direction)])
    matrix = np.eye(3)
    # Across the axis, the picture shortens and moves away from or towards the camera.
    matrix[:2, :2] += (math.cos(tilt) - 1) * np.outer(across, across)
    matrix[:2, :2] /= math.cos(tilt) ** 0.5
    matrix[2, :2] = math.sin(tilt) / (_DISTANCE * max(height, width)) * across
    return _about_the_middle(matrix, height, width)


def rotation_matrix(height: int, width: int, angle: float, zoom: float) -> np.ndarray:
    """Return the (3, 3) float64 matrix of a turn in radians, from the x to the y axis, and a zoom."""
    cosine, sine = zoom * math.cos(angle), zoom * math.sin(angle)
    return _about_the_middle(np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]), height, width)


def shear_matrix(height: int, width: int, angle: float, vertical: bool) -> np.ndarray:
    """Return the (3, 3) float64 matrix that makes vertical (else horizontal) lines lean by radians."""
    matrix = np.eye(3)
    matrix[(0, 1) if vertical else (1, 0)] = math.tan(angle)
    return _about_the_middle(matrix, height, width)


def _about_the_middle(matrix: np.ndarray, height: int, width: int) -> np.ndarray:
    """Move the origin of a homography from (0, 0) to the middle of the frame."""
    to_middle = np.array([[1, 0, (width - 1) / 2], [0, 1, (height - 1) / 2], [0, 0, 1]])
    return to_middle @ matrix @ np.linalg.inv(to_middle)


def _either_sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0
