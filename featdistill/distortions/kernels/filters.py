"""Filters and light that several distortion libraries share."""

import cv2
import numpy as np

_EDGE = cv2.BORDER_REPLICATE
# Weights as multiples of 1 / 64: sums of 8-bit samples then stay within 16 signed bits, and OpenCV filters
# directly, at a cost that grows with the number of taps that are not 0. It would take a Fourier transform for
# wider results or more than 11 x 11 taps.
_UNIT = 64
_MAX_REACH_PX = 10
_MOST_TAPS = 121


def gaussian_blur(image: np.ndarray, sigma_px: float) -> np.ndarray:
    """Return the image blurred with a Gaussian that reaches 3 sigma, edges replicated."""
    side = 2 * int(np.ceil(3 * sigma_px)) + 1
    return cv2.GaussianBlur(image, (side, side), sigma_px, borderType=_EDGE)


def line_kernel(length_px: float, angle: float) -> np.ndarray:
    """Return what a point becomes when it moves along a straight line at constant speed.

    Args:
        length_px: of the line.
        angle: in radians from the x axis, towards growing row numbers.

    Returns:
        (side, side) float64 with a sum of 1; a point between pixels is split among the four nearest.
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
    # What rounding has put into the outermost places is next to nothing.
    kernel = kernel[1:-1, 1:-1]
    return kernel / kernel.sum()


def filter_sparse(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Filter with a kernel that is mostly zeros, edges replicated.

    Args:
        image: (H, W, 3) uint8.
        kernel: (2 r + 1, 2 r + 1), r at most 10, weights 0 or more with a sum of 1.

    Returns:
        (H, W, 3) uint8, within 1 of what float arithmetic gives.
    """
    reach = len(kernel) // 2
    if reach > _MAX_REACH_PX:
        raise ValueError(f"a kernel reaches at most {_MAX_REACH_PX} px, not {reach}")
    total = None
    for taps, anchor in _small_parts(_UNIT * kernel):
        part = cv2.filter2D(image, cv2.CV_16S, taps, anchor=anchor, borderType=_EDGE)
        total = part if total is None else cv2.add(total, part, dst=total)
    return cv2.convertScaleAbs(total, alpha=1 / _UNIT)


def _small_parts(kernel: np.ndarray) -> list[tuple[np.ndarray, tuple[int, int]]]:
    """Split a kernel into as few parts as OpenCV filters directly: itself, two halves, or four quadrants.

    Returns:
        The parts, without empty rows and columns beyond the kernel's centre, as float32, each with the place
        of the centre as (x, y).
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
                y, x = (np.append(places, reach) for places in np.nonzero(part))
                box = part[y.min() : y.max() + 1, x.min() : x.max() + 1]
                parts.append((box.astype(np.float32), (int(reach - x.min()), int(reach - y.min()))))
        if all(taps.size <= _MOST_TAPS for taps, _ in parts):
            break
    return parts


def screen(image: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Add light that saturates: 255 - (255 - image) (255 - light) / 255, which is never below the image.

    Args:
        image: (H, W, 3) uint8.
        light: (H, W, 3) or, if it is grey, (H, W) uint8.

    Returns:
        (H, W, 3) uint8, a new array.
    """
    passing = cv2.bitwise_not(light)
    if passing.ndim == 2:
        passing = cv2.cvtColor(passing, cv2.COLOR_GRAY2RGB)
    missing = cv2.bitwise_not(image)
    cv2.multiply(missing, passing, dst=missing, scale=1 / 255)
    return cv2.bitwise_not(missing, dst=missing)
