"""Blur of the extended library: what camera shake, lens, air, glass and zoom do to a photograph.

Lengths are in px of the image that is given, so the same level is milder on a larger image.
"""

import math
from functools import cache

import cv2
import numpy as np

from featdistill.distortions.kernels.filters import filter_sparse, gaussian_blur, line_kernel
from featdistill.distortions.kernels.scratch import in_strips, kept
from featdistill.distortions.kernels.warps import exchange_pixels
from featdistill.distortions.operation import Operation, register

OPERATIONS: dict[str, Operation] = {}

_EDGE = cv2.BORDER_REPLICATE
# An aperture is a circle (0) or has so many straight blades, in one of so many rotations.
_BLADES = (0, 5, 6, 7, 8)
_ROTATIONS = 12
# A pixel at the rim is covered by as many parts of so many squared.
_SUBPIXELS = 8
# Air bends neighbouring rays alike: the field of displacements has a node every `_CELL_PX`, and white noise
# on the nodes is smoothed with a Gaussian of so many cells, which makes bends of about 25 px.
_CELL_PX = 8
_SMOOTHING_CELLS = 1.25
_MARGIN_CELLS = 4
# Exposures of a zoom lie so far apart in the corners of the image, or less: bands are seen from 5 px on.
_ZOOM_STEP_PX = 3.5
# A resize takes two thirds of the time of a warp, but cuts margins of whole px: from here on within 5 %.
_WHOLE_MARGIN_PX = 10


@register(OPERATIONS, "blur", (3, 6, 10, 15, 20), random=True)
def motion_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Straight motion at constant speed by so many px in a random direction.

    The point spread of a camera that moves evenly, and turns about none of its axes, while the shutter is
    open: a line of even density. 20 px is about a tenth of an input of 224 px: coarse shapes survive.
    """
    return filter_sparse(image, line_kernel(motion_blur.scales[level - 1], rng.uniform(0, math.pi)))


@register(OPERATIONS, "blur", (1.0, 1.7, 2.7, 4.0, 5.5), random=True)
def defocus_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Lens out of focus: every point becomes the image of the aperture, a disc of radius px or a polygon.

    Geometrical optics: the cone of light that passes the aperture is cut by the sensor, so the point spread
    is even inside the aperture's shape and nonnegative. The aperture is a circle or a regular polygon of 5
    to 8 blades at a random rotation, as large as gives the root mean square radius of the disc, radius /
    sqrt(2).
    """
    blades = _BLADES[int(rng.integers(len(_BLADES)))]
    radius_px, turn = defocus_blur.scales[level - 1], int(rng.integers(_ROTATIONS))
    reach_px, box, weight, rest = _aperture_parts(radius_px, blades, turn)

    def blur(strip: np.ndarray) -> np.ndarray:
        values = strip.astype(np.float32)
        total = cv2.boxFilter(strip, cv2.CV_32F, box, normalize=False, borderType=_EDGE)
        total *= np.float32(weight)
        part = np.empty_like(total)
        for taps, centre in rest:
            cv2.filter2D(values, -1, taps, dst=part, anchor=centre, borderType=_EDGE)
            cv2.add(total, part, dst=total)
        return cv2.add(total, 0, dtype=cv2.CV_8U)

    return in_strips(blur, image, reach_px)


@register(OPERATIONS, "blur", (0.4, 0.7, 1.1, 1.5, 2.0), random=True)
def atmospheric_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Turbulent air: points wander by so many px (RMS in x and in y), smoothly, and blur by as many (sigma).

    The tilt of the wavefront moves a point, its higher orders blur it in a short exposure; in Kolmogorov
    turbulence their variances have a fixed ratio, whatever the strength (Noll, 1976), so one parameter is
    taken for both. Patches keep their place: the wander is at most 2 px RMS and averages out over the image.
    """
    strength_px = atmospheric_blur.scales[level - 1]
    # OpenCV samples four channels faster than three.
    shape = (*image.shape[:2], 4)
    still = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=kept("still", shape, np.uint8))
    places = turbulent_places(*image.shape[:2], strength_px, rng)
    seen = kept("seen", shape, np.uint8)
    cv2.remap(still, places, None, cv2.INTER_LINEAR, dst=seen, borderMode=_EDGE)
    return gaussian_blur(cv2.cvtColor(seen, cv2.COLOR_RGBA2RGB), strength_px)


@register(OPERATIONS, "blur", (1, 2, 3, 4, 5), random=True)
def glass_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Frosted glass: pixels exchanged twice with others up to so many px away, and slightly blurred.

    The facets of the glass bend rays at random, each another way, so light is scattered without being lost:
    pixels are exchanged. A Gaussian of 0.6 to 1 px before and after stands for facets that are no wider
    than a pixel and for the lens. The displacements average to 0, so patches keep their place.
    """
    sigma_px = 0.5 + 0.1 * level
    exchanged = exchange_pixels(gaussian_blur(image, sigma_px), glass_blur.scales[level - 1], 2, rng)
    return gaussian_blur(exchanged, sigma_px)


@register(OPERATIONS, "blur", (0.02, 0.035, 0.055, 0.08, 0.12), keeps_layout=False)
def zoom_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Zoom during the exposure: the mean of the image magnified about its centre by 1 to 1 + amount.

    The centre stays sharp and a point at a distance r becomes a radial stroke of amount * r. Only its inner
    end stays where the point was, so patches far from the centre move outwards.
    """
    amount = zoom_blur.scales[level - 1]
    height, width = image.shape[:2]
    steps = amount * math.hypot(width, height) / 2 / _ZOOM_STEP_PX
    doublings = max(2, math.ceil(math.log2(steps + 1)))
    step = math.log1p(amount) / (2**doublings - 1)
    # OpenCV samples four channels faster than three.
    mean, further = (kept(name, (height, width, 4), np.uint8) for name in ("mean", "further"))
    cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=mean)
    # The mean of 2 n exposures is that of n and of the same n magnified further.
    for doubling in range(doublings):
        magnify(mean, math.exp(step * 2**doubling), further)
        cv2.addWeighted(mean, 0.5, further, 0.5, 0, dst=mean)
    return cv2.cvtColor(mean, cv2.COLOR_RGBA2RGB)


def magnify(image: np.ndarray, factor: float, magnified: np.ndarray) -> None:
    """Magnify an image about its centre.

    Args:
        image: (H, W, 4) uint8.
        factor: 1 or more.
        magnified: (H, W, 4) uint8, overwritten with the result.
    """
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
    """Return the point spread of a lens out of focus.

    Args:
        radius_px: of the disc, or of the disc that has the polygon's root mean square radius.
        blades: 0 for a disc, else the number of the polygon's sides.
        rotation: of the polygon in radians.

    Returns:
        (side, side) float64 with a sum of 1: a pixel is as bright as it is covered.
    """
    # The mean square radius of a regular polygon with a circumradius R is R^2 (2 + cos(2 pi / n)) / 6.
    corner_px = radius_px * math.sqrt(3 / (2 + math.cos(2 * math.pi / blades))) if blades else radius_px
    reach = math.ceil(corner_px - 0.5)
    places = (np.arange((2 * reach + 1) * _SUBPIXELS) + 0.5) / _SUBPIXELS - reach - 0.5
    x, y = places, places[:, None]
    if blades:
        inside = np.full((len(places), len(places)), True)
        for side in rotation + 2 * math.pi / blades * np.arange(blades):
            inside &= x * math.cos(side) + y * math.sin(side) < corner_px * math.cos(math.pi / blades)
    else:
        inside = np.hypot(x, y) < radius_px
    kernel = inside.reshape(2 * reach + 1, _SUBPIXELS, 2 * reach + 1, _SUBPIXELS).mean(axis=(1, 3))
    return kernel / kernel.sum()


@cache
def _aperture_parts(radius_px: float, blades: int, turn: int) -> tuple[int, tuple[int, int], float, list]:
    """Split an aperture into a box, whose cost does not grow with its size, and a rest of few taps.

    Returns:
        How many px the aperture reaches, (width, height) of the box, its weight, and the rest as kernels,
        (taps float32, place of the centre as (x, y)): four quadrants where one kernel would be wider than
        11 px, for which OpenCV would take a slow Fourier transform.
    """
    kernel = aperture_kernel(radius_px, blades, 2 * math.pi * turn / (_ROTATIONS * (blades or 1)))
    reach = len(kernel) // 2
    peak = kernel.max()

    def without_box(across: int, down: int) -> np.ndarray:
        rest = kernel.copy()
        rest[reach - down : reach + down + 1, reach - across : reach + across + 1] -= peak
        rest[np.abs(rest) < 1e-12] = 0
        return rest

    sizes = [(across, down) for across in range(reach + 1) for down in range(reach + 1)]
    across, down = min(sizes, key=lambda size: np.count_nonzero(without_box(*size)))
    rest, kernels = without_box(across, down).astype(np.float32), []
    firsts, side = ((0,), 2 * reach + 1) if reach <= 5 else ((0, reach), reach + 1)
    for top in firsts:
        for left in firsts:
            taps = rest[top : top + side, left : left + side]
            kernels.append((taps.copy(), (reach - left, reach - top)))
            taps[:] = 0
    return reach, (2 * across + 1, 2 * down + 1), float(peak), kernels


def turbulent_places(height: int, width: int, rms_px: float, rng: np.random.Generator) -> np.ndarray:
    """Return where each pixel's ray comes from: its own place and a smooth random displacement.

    Args:
        height: of the image.
        width: of the image.
        rms_px: root mean square of the displacement in x and of that in y.
        rng: what the displacement is drawn from.

    Returns:
        (H, W, 2) float32, x and y in px.
    """
    # One cell more than the image on each side: at its own edges an enlarged field is flat.
    cells = (math.ceil(height / _CELL_PX) + 2, math.ceil(width / _CELL_PX) + 2)
    wide = tuple(count + 2 * _MARGIN_CELLS for count in cells)
    taps = cv2.getGaussianKernel(2 * _MARGIN_CELLS + 1, _SMOOTHING_CELLS)[:, 0]
    nodes = cv2.sepFilter2D(rng.normal(size=(*wide, 2)), -1, taps, taps)
    nodes = nodes[_MARGIN_CELLS:-_MARGIN_CELLS, _MARGIN_CELLS:-_MARGIN_CELLS]
    # The deviation that the sums leave at the nodes, and the interpolation on average between them.
    power, neighbours = taps @ taps, taps[1:] @ taps[:-1]
    nodes = nodes * (rms_px / (power * (2 + neighbours / power) / 3))
    for axis in (0, 1):
        place = _CELL_PX * (np.arange(cells[axis]) - 0.5) - 0.5
        nodes[..., 1 - axis] += place[:, None] if axis == 0 else place
    size = (_CELL_PX * cells[1], _CELL_PX * cells[0])
    places = cv2.resize(
        nodes.astype(np.float32),
        size,
        dst=kept("places", (size[1], size[0], 2), np.float32),
        interpolation=cv2.INTER_LINEAR,
    )
    return places[_CELL_PX : _CELL_PX + height, _CELL_PX : _CELL_PX + width]
