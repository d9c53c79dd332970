"""Displacements of pixels shared by several libraries."""

import math

import cv2
import numpy as np

from featdistill.distortions.kernels.noise_tables import random_bytes
from featdistill.distortions.kernels.scratch import scratch_array

_BAND_ROWS = 128
_REFLECT = cv2.BORDER_REFLECT_101


def exchange_pixels(image: np.ndarray, reach_px: int, passes: int, rng: np.random.Generator) -> np.ndarray:
    """Exchange pixels of (H, W, 3) uint8 with others nearby, as structured glass does; none is lost.

    Each pass exchanges about half of the pixels with those at an offset, up to `reach_px` (1 or more) in x
    and in y, that is drawn for every band of rows. The directions of the passes are spread evenly.
    """
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA).view(np.int32)[..., 0]
    height = len(pixels)
    for turn in range(passes):
        if turn % 8 == 0:  # a random byte holds the bits of 8 passes
            bits = random_bytes(rng, pixels.size).reshape(pixels.shape)
        for top in range(-int(rng.integers(_BAND_ROWS)), height, _BAND_ROWS):
            band = slice(max(top, 0), top + _BAND_ROWS)
            angle, length_px = math.pi * (turn + rng.random()) / passes, reach_px * rng.uniform(0.75, 1)
            offset = (round(length_px * math.sin(angle)), round(length_px * math.cos(angle)))
            _exchange_at_offset(pixels[band], bits[band], *offset)
        np.left_shift(bits, 1, out=bits)
    return cv2.cvtColor(pixels[..., None].view(np.uint8), cv2.COLOR_RGBA2RGB)


def _exchange_at_offset(pixels: np.ndarray, bits: np.ndarray, down: int, across: int) -> None:
    """Exchange, in place, pixels with those `down` >= 0 rows below and `across` columns to the right.

    `pixels` is (h, W) int32; the highest bits of `bits`, (h, W) uint8, choose the pairs.
    """
    height, width = pixels.shape
    if down >= height or abs(across) >= width:
        return
    first = slice(0, height - down), slice(max(0, -across), width - max(0, across))
    second = slice(down, height), slice(max(0, across), width - max(0, -across))
    # A pixel with a 1 can only be the first of a pair, one with a 0 only the second, so none is in two pairs.
    # The shift turns the highest bit into a mask of all bits or none.
    chosen = ((bits[first] & ~bits[second]).view(np.int8) >> 7).astype(np.int32)
    change = (pixels[first] ^ pixels[second]) & chosen
    pixels[first] ^= change
    pixels[second] ^= change


def from_corners(image: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Map a quadrilateral of (H, W, 3) uint8 onto the whole frame, edges replicated.

    `corners` are the new corners, (4, 2) x and y in px, clockwise from the upper left.
    """
    height, width = image.shape[:2]
    matrix = cv2.getPerspectiveTransform(frame_corners(height, width), corners.astype(np.float32))
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpPerspective(image, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def frame_corners(height: int, width: int) -> np.ndarray:
    """Return the corners of an image, (4, 2) float32 x and y in px, clockwise from the upper left."""
    return np.float32([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]])


def project(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a (3, 3) homography to (H, W, 3) uint8, reflected where the image does not reach."""
    pixels, warped = _four_channels(image)
    size = image.shape[1::-1]
    cv2.warpPerspective(pixels, matrix, size, dst=warped, flags=cv2.INTER_LINEAR, borderMode=_REFLECT)
    return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)


def resample(image: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Sample (H, W, 3) uint8, reflected beyond its frame, at (H, W, 2) float32 x and y in px."""
    pixels, warped = _four_channels(image)
    cv2.remap(pixels, sources, None, cv2.INTER_LINEAR, dst=warped, borderMode=_REFLECT)
    return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)


def _four_channels(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the image with a fourth channel, which OpenCV samples faster than three, and memory like it."""
    pixels, warped = (scratch_array(name, (*image.shape[:2], 4), np.uint8) for name in ("pixels", "warped"))
    return cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=pixels), warped
