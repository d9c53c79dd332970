"""Curves, kernels and color tables of the official distortions, computed from their definitions."""

from collections.abc import Callable
from functools import cache

import numpy as np

from featdistill.distortions.kernels.srgb import from_linear, to_linear

# Linear sRGB (BT.709 primaries) to CIE XYZ, and the D65 white point of the 2 degree observer.
_XYZ_OF_RGB = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])

# The disk kernels of the organizers' released code, read off its output: their rims over- and undershoot,
# where a true disk would be weighted by area. One octant of each: radius in px -> weight of the interior and,
# for each row from the center on, the first column of the rim and the rim's weights.
_DISK_OCTANTS: dict[int, tuple[float, list[tuple[int, list[float]]]]] = {
    1: (0.318309886, [(1, [0.145343947]), (1, [0.025078581])]),
    2: (0.0801406371, [(2, [0.0383847091]), (1, [0.115264748, -0.00191262656])]),
    4: (
        0.0224130467,
        [
            (4, [0.0109725038]),
            (4, [0.0081016269]),
            (3, [0.0348338195, -0.0294132044]),
            (3, [0.00466233035]),
        ],
    ),
    6: (
        0.0105130714,
        [
            (6, [0.00518345204]),
            (6, [0.00429802435]),
            (5, [0.0189645594, -0.0475639517]),
            (5, [0.00720587735]),
            (4, [0.0519821771, -0.00344524356]),
        ],
    ),
    8: (
        0.00601848495,
        [
            (8, [0.0029778778]),
            (8, [0.00259948999]),
            (8, [0.00144578541]),
            (7, [0.0110089451, -0.0500756013]),
            (7, [0.00252877284]),
            (6, [0.0330015244, -0.0103035681]),
            (6, [0.000293466526]),
        ],
    ),
}


@cache
def gaussian_taps(sigma_px: float, radius_px: int) -> np.ndarray:
    """Return the (2 radius + 1,) float64 weights exp(-i^2 / (2 sigma^2)), normalized to a sum of 1."""
    offsets = np.arange(-radius_px, radius_px + 1)
    taps = np.exp(-(offsets**2) / (2 * sigma_px**2))
    return taps / taps.sum()


@cache
def disk_kernel(radius_px: int) -> np.ndarray:
    """Return the released disk kernel, (2 radius + 1, 2 radius + 1) float64 with a sum of 1."""
    interior, octant = _DISK_OCTANTS[radius_px]
    quadrant = np.zeros((radius_px + 1, radius_px + 1))
    for row, (first, rim) in enumerate(octant):
        quadrant[row, row:first] = interior
        quadrant[row, first : first + len(rim)] = rim
    quadrant = np.triu(quadrant) + np.triu(quadrant, 1).T
    half = np.hstack([quadrant[:, :0:-1], quadrant])
    kernel = np.vstack([half[:0:-1], half])
    return kernel / kernel.sum()


def middle_curve(amount: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return the parabola through (0, 0), (0.5, 0.5 + amount / 2) and (1, 1), clipped to [0, 1]."""
    middle = 0.5 + amount / 2
    return lambda x: np.clip((2 - 4 * middle) * x**2 + (4 * middle - 1) * x, 0, 1)


def contrast_curve(amount: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return the not-a-knot cubic spline through five points, clipped to [0, 1].

    The points are (0, 0), (0.3, 0.25 - amount / 4), (0.5, 0.5), (0.7, 0.75 + amount / 4) and (1, 1).
    """
    from scipy.interpolate import CubicSpline  # here, because it takes half a second to import

    spline = CubicSpline([0, 0.3, 0.5, 0.7, 1], [0, 0.25 - amount / 4, 0.5, 0.75 + amount / 4, 1])
    return lambda x: np.clip(spline(x), 0, 1)


@cache
def curve_table(curve: Callable[[float], Callable[[np.ndarray], np.ndarray]], amount: float) -> np.ndarray:
    """Return the (256,) uint8 table of `curve(amount)`, a curve on [0, 1]."""
    return np.rint(255 * curve(amount)(np.arange(256) / 255)).astype(np.uint8)


def lightness_through(curve: Callable[[np.ndarray], np.ndarray], rgb: np.ndarray) -> np.ndarray:
    """Apply a curve of lightness / 100 to the CIELAB lightness of colors, keeping a* and b*.

    Colors are (..., 3) float64 sRGB, clipped to [0, 1].
    """
    xyz = to_linear(rgb) @ _XYZ_OF_RGB.T / _WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lightness = 1.16 * f[..., 1] - 0.16
    f += ((curve(lightness) - lightness) / 1.16)[..., None]
    xyz = np.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787) * _WHITE
    return from_linear(xyz @ np.linalg.inv(_XYZ_OF_RGB).T)


def brighten_colors(amount: float, rgb: np.ndarray) -> np.ndarray:
    """Apply the official brightening to colors, (..., 3) float64 in [0, 1].

    Two thirds are the curve on R, G and B, one third is the curve on the CIELAB lightness. The released code
    swaps red and blue before its color conversion, and so does this.
    """
    curve = middle_curve(amount)
    return (2 * curve(rgb) + lightness_through(curve, rgb[..., ::-1])[..., ::-1]) / 3


class BrightenTable:
    """`brighten_colors` as an image to interpolate in: exact in green, bilinear in red and blue.

    The image has 16 x 16 slices, one for each of the 256 values of green, of 33 x 33 colors (blue down, red
    to the right). `cv2.remap` reads it with fixed-point coordinates.

    Attributes:
        image: (528, 528, 3) float32 in [0, 255].
        whole: what red, green and blue add to a pixel's coordinates, (256,) int32 each: the column in the
            lower 16 bits, the row in the upper ones.
        fraction_red: (256,) uint16, what red adds to the pixel's fractions in 32nds.
        fraction_blue: the same for blue.
    """

    KNOTS = np.append(np.arange(0, 256, 8), 255)

    def __init__(self, amount: float) -> None:
        size = len(self.KNOTS)
        green = np.arange(256).reshape(16, 1, 16, 1)
        blue, red = self.KNOTS[:, None, None], self.KNOTS
        colors = np.stack(np.broadcast_arrays(red, green, blue), axis=-1) / 255
        self.image = (
            (255 * brighten_colors(amount, colors)).astype(np.float32).reshape(16 * size, 16 * size, 3)
        )

        value = np.arange(256, dtype=np.int32)
        knot = (np.searchsorted(self.KNOTS, value, side="right") - 1).astype(np.int32)
        width = np.append(np.diff(self.KNOTS), 1)[knot]
        fraction = np.rint(32 * (value - self.KNOTS[knot]) / width).astype(np.uint16)
        row = 1 << 16
        self.whole = (knot, size * (value % 16) + row * size * (value // 16), row * knot)
        self.fraction_red, self.fraction_blue = fraction, 32 * fraction
