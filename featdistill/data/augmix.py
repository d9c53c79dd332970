"""AugMix: an image is mixed with copies of itself that went through chains of simple operations.

Hendrycks et al. 2020, "AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty",
algorithm 1, with the operations and their ranges of the authors' code. Left out is their consistency loss
over two mixtures; `consistency_weight` compares with the clean image instead.
"""

from collections.abc import Callable

import cv2
import numpy as np

# In the authors' code, strengths are drawn from this to `severity`, both in tenths of an operation's maximum.
_LEAST = 0.1
_MAX_DEGREES = 30
_MAX_SHEAR = 0.3
_MAX_SHIFT = 1 / 3
_MAX_DEPTH = 3
_LEVELS = np.arange(256)

# An operation takes (H, W, 3) uint8 RGB and a strength from -1 to 1, and returns a new array of that shape.
AugMixOperation = Callable[[np.ndarray, float], np.ndarray]


def augmix(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    severity: float = 3.0,
    width: int = 3,
    depth: int = 0,
    keeps_layout_only: bool = False,
) -> np.ndarray:
    """Return (1 - m) * image + m * (w_1 * chain_1 + ... + w_width * chain_width), rounded to uint8.

    The w are from a symmetric Dirichlet distribution, m is from a Beta distribution, both with parameter 1.

    Args:
        image: (H, W, 3) uint8 RGB.
        severity: largest strength of an operation in tenths of its range, 0.1 to 10.
        width: number of chains.
        depth: operations of a chain; 0: 1 to 3, drawn for each chain.
        keeps_layout_only: use only operations that leave every pixel in its place.
    """
    operations = [*TONES.values(), *([] if keeps_layout_only else MOVES.values())]
    weights, share = rng.dirichlet(np.ones(width)), rng.beta(1, 1)
    mixed = image * np.float32(1 - share)
    for weight in weights:
        chain = image
        for _ in range(depth or rng.integers(1, _MAX_DEPTH + 1)):
            operation = operations[rng.integers(len(operations))]
            strength = rng.uniform(_LEAST, severity) / 10
            chain = operation(chain, strength * (1 if rng.random() < 0.5 else -1))
        mixed = cv2.addWeighted(chain, share * weight, mixed, 1, 0, dtype=cv2.CV_32F)
    return cv2.convertScaleAbs(mixed)


def autocontrast(image: np.ndarray, strength: float) -> np.ndarray:
    """Stretch each channel to 0 to 255."""
    tables = []
    for channel in cv2.split(image):
        low, high = cv2.minMaxLoc(channel)[:2]
        scale = 255 / max(1, high - low)
        tables.append(np.clip(_LEVELS * scale - low * scale, 0, 255) if high > low else _LEVELS)
    return _look_up(image, tables)


def equalize(image: np.ndarray, strength: float) -> np.ndarray:
    """Flatten the histogram of each channel."""
    tables = []
    for channel in cv2.split(image):
        counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        used = np.flatnonzero(counts)
        step = int(counts.sum() - counts[used[-1]]) // 255
        before = step // 2 + np.cumsum(counts) - counts
        tables.append(np.clip(before // step, 0, 255) if step else _LEVELS)
    return _look_up(image, tables)


def posterize(image: np.ndarray, strength: float) -> np.ndarray:
    """Keep the 4 - 4 * strength highest bits of each channel."""
    bits = 4 - int(4 * abs(strength))
    return _look_up(image, [_LEVELS & (0xFF << (8 - bits))] * 3)


def solarize(image: np.ndarray, strength: float) -> np.ndarray:
    """Invert what is at least 256 - 256 * strength."""
    threshold = 256 - int(256 * abs(strength))
    return _look_up(image, [np.where(threshold <= _LEVELS, 255 - _LEVELS, _LEVELS)] * 3)


def rotate(image: np.ndarray, strength: float) -> np.ndarray:
    """Rotate about the center by up to 30 degrees."""
    height, width = image.shape[:2]
    angle = int(_MAX_DEGREES * strength)
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1)
    return cv2.warpAffine(image, matrix, (width, height))


def shear_x(image: np.ndarray, strength: float) -> np.ndarray:
    """Shift each row in proportion to its number."""
    return _taken_from(image, [[1, _MAX_SHEAR * strength, 0], [0, 1, 0]])


def shear_y(image: np.ndarray, strength: float) -> np.ndarray:
    """Shift each column in proportion to its number."""
    return _taken_from(image, [[1, 0, 0], [_MAX_SHEAR * strength, 1, 0]])


def translate_x(image: np.ndarray, strength: float) -> np.ndarray:
    """Shift to the left by up to a third of the width, or to the right."""
    return _taken_from(image, [[1, 0, int(_MAX_SHIFT * image.shape[1] * strength)], [0, 1, 0]])


def translate_y(image: np.ndarray, strength: float) -> np.ndarray:
    """Shift upwards by up to a third of the height, or downwards."""
    return _taken_from(image, [[1, 0, 0], [0, 1, int(_MAX_SHIFT * image.shape[0] * strength)]])


TONES: dict[str, AugMixOperation] = {
    one.__name__: one for one in (autocontrast, equalize, posterize, solarize)
}
MOVES: dict[str, AugMixOperation] = {
    one.__name__: one for one in (rotate, shear_x, shear_y, translate_x, translate_y)
}


def _look_up(image: np.ndarray, tables: list[np.ndarray]) -> np.ndarray:
    return cv2.LUT(image, np.stack(tables, axis=1).astype(np.uint8)[None])


def _taken_from(image: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
    """Return for each pixel (x, y) the input at matrix * (x, y, 1), bilinear; black beyond the image."""
    matrix = np.array(matrix, float)
    # Coordinates of Pillow, which the authors use, are those of corners, and OpenCV's those of centers.
    matrix[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
    height, width = image.shape[:2]
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
