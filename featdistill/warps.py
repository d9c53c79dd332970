"""Moves of pixels that several distortion libraries share."""

import cv2
import numpy as np


def exchange_pixels(image: np.ndarray, reach_px: int, passes: int, rng: np.random.Generator) -> np.ndarray:
    """Exchange pixels with others nearby, as structured glass does; no pixel is lost or doubled.

    Each pass pairs the pixels at one random offset and exchanges each pair with probability 1/2.

    Args:
        image: (H, W, 3) uint8.
        reach_px: largest distance of a pair in x and in y.
        passes: how often.

    Returns:
        (H, W, 3) uint8, a new array.
    """
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA).view(np.int32)[..., 0]
    height, width = pixels.shape
    for _ in range(passes):
        down, across = int(rng.integers(1, reach_px + 1)), int(rng.integers(-reach_px, reach_px + 1))
        first = int(rng.integers(2 * down))
        count = (height - first) // (2 * down)
        rows = pixels[first : first + 2 * down * count].reshape(count, 2, down, width)
        one = rows[:, 0, :, max(0, -across) : width - max(0, across)]
        other = rows[:, 1, :, max(0, across) : width - max(0, -across)]
        # The sign of a random number makes a mask of all bits or none.
        mask = rng.integers(-(2**31), 2**31, one.shape, dtype=np.int32) >> 31
        change = (one ^ other) & mask
        one ^= change
        other ^= change
    return cv2.cvtColor(pixels[..., None].view(np.uint8), cv2.COLOR_RGBA2RGB)


def from_corners(image: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Map a quadrilateral of the image onto the whole frame, edges replicated.

    Args:
        image: (H, W, 3) uint8.
        corners: (4, 2) x and y in px of what becomes the upper left, upper right, lower right and lower left
            corner.

    Returns:
        (H, W, 3) uint8, a new array.
    """
    height, width = image.shape[:2]
    right, bottom = width - 1, height - 1
    frame = np.float32([[0, 0], [right, 0], [right, bottom], [0, bottom]])
    matrix = cv2.getPerspectiveTransform(frame, corners.astype(np.float32))
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpPerspective(image, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
