"""Blur of the extended library: camera shake, lens, air, glass and zoom.

Lengths are in px of the given image, so the same level is milder on a larger image.
"""

import math
from functools import cache

import cv2
import numpy as np

from featdistill.distortions.kernels.filters import BoxAndRest, filter_sparse, gaussian_blur, line_kernel
from featdistill.distortions.kernels.scratch import in_strips, scratch_array
from featdistill.distortions.kernels.warps import exchange_pixels
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

_EDGE = cv2.BORDER_REPLICATE
# An aperture is a circle (0) or has this many straight blades, in one of 12 rotations.
_BLADES = (0, 5, 6, 7, 8)
_ROTATIONS = 12
# The coverage of a pixel at the rim is counted on this many squared parts of it.
_SUBPIXELS = 8
# Air bends neighboring rays alike: the displacements have a node every `_CELL_PX`, and white noise on the
# nodes is smoothed with a Gaussian of `_SMOOTHING_CELLS`, which makes bends of about 25 px.
_CELL_PX = 8
_SMOOTHING_CELLS = 1.25
_MARGIN_CELLS = 4
# Largest distance between exposures of a zoom, in the corners of the image; bands become visible at 5 px.
_ZOOM_STEP_PX = 3.5
# A resize takes two thirds of the time of a warp, but crops whole px. From this margin on that is within 5 %.
_WHOLE_MARGIN_PX = 10


@register(OPERATIONS, "blur", (3, 6, 10, 15, 20), random=True)
def motion_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Straight motion at constant speed in a random direction; scale: distance in px.

    This is the point spread of a camera that moves evenly, without turning, while the shutter is open. 20 px
    is about a tenth of an input of 224 px: coarse shapes survive.
    """
    return filter_sparse(image, line_kernel(motion_blur.scales[level - 1], rng.uniform(0, math.pi)))


@register(OPERATIONS, "blur", (1.0, 1.7, 2.7, 4.0, 5.5), random=True)
def defocus_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Lens out of focus: points become the aperture, a disc or a polygon; scale: radius in px.

    In geometrical optics the sensor cuts the cone of light that passes the aperture, so the point spread is
    even inside the aperture's shape. The aperture is a circle or a regular polygon of 5 to 8 blades, randomly
    rotated, with the root mean square radius of the disc, radius / sqrt(2).
    """
    blades = _BLADES[int(rng.integers(len(_BLADES)))]
    aperture = _aperture(defocus_blur.scales[level - 1], blades, int(rng.integers(_ROTATIONS)))
    return in_strips(aperture, image, aperture.reach_px)


@register(OPERATIONS, "blur", (0.4, 0.7, 1.1, 1.5, 2.0), random=True)
def atmospheric_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Turbulent air: smooth displacements and blur; scale: RMS in x and in y, and sigma, in px.

    The tilt of the wavefront moves a point, its higher orders blur it in a short exposure. In Kolmogorov
    turbulence their variances have a fixed ratio whatever the strength (Noll, 1976), so one parameter serves
    for both. Patches stay in place: displacements are at most 2 px RMS and average out over the image.
    """
    strength_px = atmospheric_blur.scales[level - 1]
    # OpenCV samples four channels faster than three.
    shape = (*image.shape[:2], 4)
    still = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=scratch_array("still", shape, np.uint8))
    sources = turbulent_sources(*image.shape[:2], strength_px, rng)
    moved = scratch_array("moved", shape, np.uint8)
    cv2.remap(still, sources, None, cv2.INTER_LINEAR, dst=moved, borderMode=_EDGE)
    return gaussian_blur(cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB), strength_px)


@register(OPERATIONS, "blur", (1, 2, 3, 4, 5), random=True)
def glass_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Frosted glass: nearby pixels exchanged twice and slightly blurred; scale: largest distance in px.

    The facets of the glass bend rays in random directions, which scatters light without losing it. A Gaussian
    of 0.6 to 1 px before and after stands for the lens and for facets narrower than a pixel. Displacements
    average to 0, so patches stay in place.
    """
    sigma_px = 0.5 + 0.1 * level
    exchanged = exchange_pixels(gaussian_blur(image, sigma_px), glass_blur.scales[level - 1], 2, rng)
    return gaussian_blur(exchanged, sigma_px)


@register(OPERATIONS, "blur", (0.02, 0.035, 0.055, 0.08, 0.12), keeps_layout=False)
def zoom_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Zoom during the exposure: the mean of magnifications by 1 to 1 + scale.

    The center stays sharp and a point at distance r becomes a radial stroke of length scale * r. Only its
    inner end stays in place, so patches far from the center move outwards.
    """
    amount = zoom_blur.scales[level - 1]
    height, width = image.shape[:2]
    steps = amount * math.hypot(width, height) / 2 / _ZOOM_STEP_PX
    doublings = max(2, math.ceil(math.log2(steps + 1)))
    step = math.log1p(amount) / (2**doublings - 1)
    # OpenCV samples four channels faster than three.
    mean, further = (scratch_array(name, (height, width, 4), np.uint8) for name in ("mean", "further"))
    cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=mean)
    # The mean of 2 n exposures is that of n and of the same n magnified further.
    for doubling in range(doublings):
        magnify(mean, math.exp(step * 2**doubling), further)
        cv2.addWeighted(mean, 0.5, further, 0.5, 0, dst=mean)
    return cv2.cvtColor(mean, cv2.COLOR_RGBA2RGB)


def magnify(image: np.ndarray, factor: float, magnified: np.ndarray) -> None:
    """Magnify (H, W, 4) uint8 about its center, by a factor of 1 or more, into `magnified`."""
    height, width = image.shape[:2]
    lost = 1 - 1 / factor
    left, top = round(lost * width / 2), round(lost * height / 2)
    if min(left, top) >= _WHOLE_MARGIN_PX:
        inner = image[top : height - top, left : width - left]
        cv2.resize(inner, (width, height), dst=magnified, interpolation=cv2.INTER_LINEAR)
        return
    matrix = np.array([[1 - lost, 0, lost * (width - 1) / 2], [0, 1 - lost, lost * (height - 1) / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(image, matrix, (width, height), dst=magnified, flags=flags, borderMode=_EDGE)


def aperture_kernel(radius_px: float, blades: int, rotation: float) -> np.ndarray:
    """Return the point spread of a lens out of focus, (side, side) float64 with a sum of 1.

    Args:
        radius_px: of the disc, or of the disc with the polygon's root mean square radius.
        blades: 0 for a disc, else the number of the polygon's sides.
        rotation: of the polygon in radians.
    """
    # The mean square radius of a regular polygon with a circumradius R is R^2 (2 + cos(2 pi / n)) / 6.
    corner_px = radius_px * math.sqrt(3 / (2 + math.cos(2 * math.pi / blades))) if blades else radius_px
    reach = math.ceil(corner_px - 0.5)
    x = (np.arange((2 * reach + 1) * _SUBPIXELS) + 0.5) / _SUBPIXELS - reach - 0.5
    y = x[:, None]
    if blades:
        inside = np.full((len(x), len(x)), True)
        for side in rotation + 2 * math.pi / blades * np.arange(blades):
            inside &= x * math.cos(side) + y * math.sin(side) < corner_px * math.cos(math.pi / blades)
    else:
        inside = np.hypot(x, y) < radius_px
    kernel = inside.reshape(2 * reach + 1, _SUBPIXELS, 2 * reach + 1, _SUBPIXELS).mean(axis=(1, 3))
    return kernel / kernel.sum()


@cache
def _aperture(radius_px: float, blades: int, turn: int) -> BoxAndRest:
    kernel = aperture_kernel(radius_px, blades, 2 * math.pi * turn / (_ROTATIONS * (blades or 1)))
    return BoxAndRest(kernel, kernel.max(), in_quadrants=len(kernel) > 11)


def turbulent_sources(height: int, width: int, rms_px: float, rng: np.random.Generator) -> np.ndarray:
    """Draw where each pixel's ray comes from, `rms_px` away in x and in y: (H, W, 2) float32 in px."""
    # One cell more than the image on each side: an enlarged field is flat at its own edges.
    cells = (math.ceil(height / _CELL_PX) + 2, math.ceil(width / _CELL_PX) + 2)
    wide = tuple(count + 2 * _MARGIN_CELLS for count in cells)
    taps = cv2.getGaussianKernel(2 * _MARGIN_CELLS + 1, _SMOOTHING_CELLS)[:, 0]
    nodes = cv2.sepFilter2D(rng.normal(size=(*wide, 2)), -1, taps, taps)
    nodes = nodes[_MARGIN_CELLS:-_MARGIN_CELLS, _MARGIN_CELLS:-_MARGIN_CELLS]
    # The deviation that the sums leave at the nodes, and the interpolation on average between them.
    power, neighbors = taps @ taps, taps[1:] @ taps[:-1]
    nodes = nodes * (rms_px / (power * (2 + neighbors / power) / 3))
    rows, columns = (_CELL_PX * (np.arange(count) - 0.5) - 0.5 for count in cells)
    nodes[..., 0] += columns
    nodes[..., 1] += rows[:, None]
    size = (_CELL_PX * cells[1], _CELL_PX * cells[0])
    sources = scratch_array("sources", (size[1], size[0], 2), np.float32)
    cv2.resize(nodes.astype(np.float32), size, dst=sources, interpolation=cv2.INTER_LINEAR)
    return sources[_CELL_PX : _CELL_PX + height, _CELL_PX : _CELL_PX + width]
