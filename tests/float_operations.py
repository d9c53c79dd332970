"""The official operations straight from their definitions, as formulas on floats, to compare ours with."""

import io

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import conv2d, pad

from featdistill.distortions.official_tables import contrast_curve, disk_kernel, gaussian_taps, middle_curve

# (H, W, 3) float32 in [0, 1], the parameter at the level, and a generator.


def gausblur(pixels: np.ndarray, sigma_px: float, rng: np.random.Generator) -> np.ndarray:
    return gaussian_blur(pixels, sigma_px, int(np.ceil(2 * sigma_px)))


def lensblur(pixels: np.ndarray, radius_px: int, rng: np.random.Generator) -> np.ndarray:
    return convolve(pixels, disk_kernel(radius_px))


def colorshift(pixels: np.ndarray, amount_px: float, rng: np.random.Generator) -> np.ndarray:
    direction = rng.random(2)
    across, down = np.rint(amount_px * direction / np.hypot(*direction)).astype(int)
    green, gray = pixels[..., 1], pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    height, width = green.shape
    rows = ((np.arange(height) + down - across) % (height + 2 * down)) - down
    columns = ((np.arange(width) + across - down) % (width + 2 * across)) - across
    shifted = green[np.clip(rows, 0, height - 1)[:, None], np.clip(columns, 0, width - 1)]
    padded = np.pad(gray, 1, mode="edge")
    to_the_right, downwards = padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]
    gradient = np.sqrt(to_the_right**2 + downwards**2)
    mask = gaussian_blur(gradient[..., None], 4.0, 8)[..., 0]
    mask = (mask - mask.min()) / max(mask.max() - mask.min(), 1e-12)
    column_0, every_row = mask[:, :1], np.arange(height)
    lowest, highest = (mask < column_0).sum(axis=1), (mask > column_0).sum(axis=1)
    mask[every_row, lowest] = 0
    mask[every_row, highest] = 1
    result = pixels.copy()
    result[..., 1] = mask * shifted + (1 - mask) * green
    return result


def colorsat(pixels: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    # NumPy's maximum over an axis of three takes ten times as long.
    value = np.maximum(np.maximum(pixels[..., 0], pixels[..., 1]), pixels[..., 2])[..., None]
    return value + factor * (pixels - value)


def jpeg(pixels: np.ndarray, quality_0_100: int, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray((255 * pixels).astype(np.uint8)).save(file, "JPEG", quality=quality_0_100)
    with Image.open(file) as picture:
        return np.asarray(picture, dtype=np.float32) / 255


def brighten(pixels: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    curve = middle_curve(amount)
    # The organizers' code exchanges red and blue here, and so does this.
    lab = cv2.cvtColor(np.ascontiguousarray(pixels[..., ::-1]), cv2.COLOR_RGB2Lab)
    lab[..., 0] = 100 * curve(lab[..., 0] / 100)
    encoded = cv2.cvtColor(lab, cv2.COLOR_Lab2RGB)[..., ::-1]
    return (2 * curve(pixels) + np.clip(encoded, 0, 1)) / 3


def darken(pixels: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    return middle_curve(-amount)(pixels)


def quantization(pixels: np.ndarray, levels: int, rng: np.random.Generator) -> np.ndarray:
    thresholds = [0] + [int(255 * i / levels) for i in range(1, levels)]
    # The tolerance keeps what came from 8 bits on its side of a threshold.
    classes = np.searchsorted(np.float32(thresholds) + np.float32(1e-3), 255 * pixels, side="left")
    return (classes - classes.min()) / max(classes.max() - classes.min(), 1)


def lincontrchange(pixels: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    return contrast_curve(amount)(pixels)


_FUNCTIONS = [gausblur, lensblur, colorshift, colorsat, jpeg, brighten, darken, quantization, lincontrchange]
OPERATIONS = {function.__name__: function for function in _FUNCTIONS}


def gaussian_blur(pixels: np.ndarray, sigma_px: float, radius_px: int) -> np.ndarray:
    taps = gaussian_taps(sigma_px, radius_px)
    return convolve(pixels, np.outer(taps, taps))


def convolve(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Filter each channel of (H, W, C) with a (side, side) kernel, edges replicated."""
    reach, channels = len(kernel) // 2, pixels.shape[2]
    planes = pad(torch.from_numpy(pixels).permute(2, 0, 1)[None], [reach] * 4, mode="replicate")
    taps = torch.from_numpy(kernel.astype(np.float32)).expand(channels, 1, -1, -1)
    return conv2d(planes, taps, groups=channels)[0].permute(1, 2, 0).numpy()
