"""Filters and light shared by several libraries."""

import cv2
import numpy as np

_EDGE = cv2.BORDER_REPLICATE
# `filter_sparse` takes weights as multiples of 1 / 64, which keeps sums of 8-bit samples within 16 signed
# bits, and at most 11 x 11 taps. OpenCV then filters directly, at a cost that grows with the number of
# nonzero taps; otherwise it would use a Fourier transform.
_UNIT = 64
_MAX_REACH_PX = 10
_MAX_TAPS = 121


def gaussian_blur(image: np.ndarray, sigma_px: float) -> np.ndarray:
    """Return the image blurred with a Gaussian cut off at 3 sigma, edges replicated."""
    side = 2 * int(np.ceil(3 * sigma_px)) + 1
    return cv2.GaussianBlur(image, (side, side), sigma_px, borderType=_EDGE)


def line_kernel(length_px: float, angle: float) -> np.ndarray:
    """Return the point spread of a straight motion at constant speed, (side, side) float64 with a sum of 1.

    The angle is in radians, from the x axis towards growing row numbers. A point between pixels is split
    among the four nearest.
    """
    reach = int(np.ceil(length_px / 2))
    side = 2 * reach + 3
    points = int(8 * length_px) + 1
    along = length_px * ((np.arange(points) + 0.5) / points - 0.5)
    x, y = reach + 1 + along * np.cos(angle), reach + 1 + along * np.sin(angle)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right_share, lower_share = x - left, y - top
    kernel = np.zeros((side, side))
    for down, row_share in ((0, 1 - lower_share), (1, lower_share)):
        for across, column_share in ((0, 1 - right_share), (1, right_share)):
            np.add.at(kernel, (top + down, left + across), row_share * column_share)
    # The outermost taps hold rounding errors only.
    kernel = kernel[1:-1, 1:-1]
    return kernel / kernel.sum()


def filter_sparse(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Filter (H, W, 3) uint8 with a kernel that is mostly zeros, edges replicated.

    The kernel is (2 r + 1, 2 r + 1) with r of at most 10 and nonnegative weights that sum to 1. The result is
    within 1 of that of float arithmetic.
    """
    reach = len(kernel) // 2
    if reach > _MAX_REACH_PX:
        raise ValueError(f"a kernel can reach at most {_MAX_REACH_PX} px, not {reach}")
    total = None
    for taps, anchor in _small_parts(_UNIT * kernel):
        part = cv2.filter2D(image, cv2.CV_16S, taps, anchor=anchor, borderType=_EDGE)
        total = part if total is None else cv2.add(total, part, dst=total)
    return cv2.convertScaleAbs(total, alpha=1 / _UNIT)


def _small_parts(kernel: np.ndarray) -> list[tuple[np.ndarray, tuple[int, int]]]:
    """Split a kernel into as few parts as OpenCV filters directly: itself, two halves, or four quadrants.

    A part is its float32 taps, cropped as far as possible, and the (x, y) of the kernel's center in them.
    """
    reach = len(kernel) // 2
    whole, first, second = slice(None), slice(None, reach + 1), slice(reach + 1, None)
    splits = (
        [(whole, whole)],
        [(whole, first), (whole, second)],
        [(first, whole), (second, whole)],
        [(first, first), (first, second), (second, first), (second, second)],
    )
    for split in splits:
        parts = []
        for rows, columns in split:
            part = np.zeros_like(kernel)
            part[rows, columns] = kernel[rows, columns]
            if part.any():
                y, x = (np.append(indices, reach) for indices in np.nonzero(part))
                box = part[y.min() : y.max() + 1, x.min() : x.max() + 1]
                parts.append((box.astype(np.float32), (int(reach - x.min()), int(reach - y.min()))))
        if all(taps.size <= _MAX_TAPS for taps, _ in parts):
            break
    return parts


class BoxAndRest:
    """A kernel as a box, whose cost does not grow with its size, and a rest with few nonzero taps.

    Args:
        kernel: (2 r + 1, 2 r + 1) float64.
        weight: of the box; its size is the one that leaves the fewest nonzero taps.
        in_quadrants: split the rest; OpenCV uses a slow Fourier transform for more than 11 x 11 taps.
    """

    def __init__(self, kernel: np.ndarray, weight: float, in_quadrants: bool) -> None:
        reach = len(kernel) // 2

        def without_box(across: int, down: int) -> np.ndarray:
            rest = kernel.copy()
            rest[reach - down : reach + down + 1, reach - across : reach + across + 1] -= weight
            rest[np.abs(rest) < 1e-12] = 0
            return rest

        sizes = [(across, down) for across in range(reach + 1) for down in range(reach + 1)]
        across, down = min(sizes, key=lambda size: np.count_nonzero(without_box(*size)))
        rest = without_box(across, down).astype(np.float32)
        self.reach_px, self.box, self.weight = reach, (2 * across + 1, 2 * down + 1), np.float32(weight)
        self.parts: list[tuple[np.ndarray, tuple[int, int]]] = []
        starts, side = ((0, reach), reach + 1) if in_quadrants else ((0,), 2 * reach + 1)
        for top in starts:
            for left in starts:
                taps = rest[top : top + side, left : left + side]
                self.parts.append((taps.copy(), (reach - left, reach - top)))
                taps[:] = 0

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Filter an image, (H, W, 3) uint8 in and out, edges replicated."""
        values = image.astype(np.float32)
        total = cv2.boxFilter(image, cv2.CV_32F, self.box, normalize=False, borderType=_EDGE)
        total *= self.weight
        part = np.empty_like(total)
        for taps, anchor in self.parts:
            cv2.filter2D(values, -1, taps, dst=part, anchor=anchor, borderType=_EDGE)
            cv2.add(total, part, dst=total)
        return cv2.add(total, 0, dtype=cv2.CV_8U)


def screen(image: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Add light that saturates, (H, W, 3) or (H, W) uint8: 255 - (255 - image) (255 - light) / 255."""
    passing = cv2.bitwise_not(light)
    if passing.ndim == 2:
        passing = cv2.cvtColor(passing, cv2.COLOR_GRAY2RGB)
    missing = cv2.bitwise_not(image)
    cv2.multiply(missing, passing, dst=missing, scale=1 / 255)
    return cv2.bitwise_not(missing, dst=missing)


def layer_size(height: int, width: int, max_shorter_px: int) -> tuple[int, int]:
    """Return (rows, columns) of a layer with an image's aspect ratio and a limited shorter side."""
    ratio = min(1, max_shorter_px / min(height, width))
    return round(height * ratio), round(width * ratio)
