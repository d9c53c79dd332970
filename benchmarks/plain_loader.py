"""The loader that ours is compared with: float arrays, and the operations straight from their definitions.

It is what is commonly written for such a competition. Pillow decodes and resizes, the official operations are
formulas on (H, W, 3) float32 arrays in [0, 1], filters and warps are PyTorch's convolution and grid sampling,
batches are normalized float32 tensors, stacked by PyTorch's default collate. Plans, crops and flips are drawn
as for `TrainDataset`, so both loaders do the same work. Operations of other libraries than the official one
are the project's own, called on uint8.
"""

import io
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn.functional import conv2d, grid_sample, pad
from torch.utils.data import Dataset
from torchvision.transforms import functional

from featdistill.data.preprocessing import Place, Preprocessing, offset
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.official_tables import contrast_curve, disk_kernel, gaussian_taps, middle_curve
from featdistill.distortions.plan import Plan
from featdistill.distortions.policy import DistortionPolicy
from featdistill.seeds import training_generator


class PlainDataset(Dataset):
    """Training rows as normalized float32 images; the counterpart of `TrainDataset` for one view."""

    def __init__(
        self, rows: pd.DataFrame, preprocessing: Preprocessing, policy: DistortionPolicy, seed: int
    ) -> None:
        if preprocessing.resize != "shorter" or policy.max_side_px is not None:
            raise ValueError("the plain loader only resizes the shorter side, and does not know max_side_px")
        self.images, self.labels = rows["image"].tolist(), rows["label"].tolist()
        self.size, self.policy, self.seed = preprocessing.size, policy, seed
        self.mean, self.std = preprocessing.mean, preprocessing.std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        epoch, index = item
        rng = training_generator(self.seed, 1, epoch, index)
        top, left, mirror = rng.random(3)
        place = Place(top, left, bool(mirror < 0.5))
        plan = self.policy.draw(rng)
        with Image.open(self.images[index]) as file:
            picture = file.convert("RGB")
        if self.policy.distort_at == "native" and plan:
            picture = to_picture(distort(to_floats(picture), plan))
        pixels = to_floats(self._fit(picture, place))
        if self.policy.distort_at == "input" and plan:
            pixels = distort(pixels, plan)
            if pixels.shape[:2] != (self.size, self.size):
                square = to_picture(pixels).resize((self.size, self.size), Image.Resampling.BICUBIC)
                pixels = to_floats(square)
        images = functional.normalize(functional.to_tensor(pixels), self.mean, self.std)
        return {"images": images, "label": self.labels[index], "index": index}

    def _fit(self, picture: Image.Image, place: Place) -> Image.Image:
        """Resize the shorter side to the input's, crop, and flip if so drawn."""
        picture = functional.resize(picture, self.size, functional.InterpolationMode.BICUBIC)
        left = offset(place.left, picture.width - self.size)
        top = offset(place.top, picture.height - self.size)
        picture = functional.crop(picture, top, left, self.size, self.size)
        return functional.hflip(picture) if place.flip else picture


def to_floats(picture: Image.Image) -> np.ndarray:
    """Return (H, W, 3) float32 in [0, 1]."""
    return np.asarray(picture, dtype=np.float32) / 255


def to_picture(pixels: np.ndarray) -> Image.Image:
    """Round (H, W, 3) floats in [0, 1] to a picture of 8 bits."""
    return Image.fromarray(np.rint(255 * pixels).astype(np.uint8))


def distort(pixels: np.ndarray, plan: Plan) -> np.ndarray:
    """Apply a plan to (H, W, 3) float32 in [0, 1], and return the same; clipped after each step."""
    for step in plan:
        rng, operation = np.random.default_rng(step.seed), LIBRARIES[step.library][step.name]
        if step.library == "official":
            pixels = OPERATIONS[step.name](pixels, operation.scales[step.level - 1], rng)
            pixels = np.clip(pixels, 0, 1).astype(np.float32, copy=False)
        else:
            pixels = np.rint(255 * pixels).astype(np.uint8)
            pixels = operation(pixels, step.level, rng).astype(np.float32) / 255
    return pixels


# The official operations: (H, W, 3) float32 in [0, 1], the parameter at the level, and a generator.


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
        return to_floats(picture)


def whitenoise(pixels: np.ndarray, variance: float, rng: np.random.Generator) -> np.ndarray:
    return pixels + np.float32(variance**0.5) * rng.standard_normal(pixels.shape, np.float32)


def impulsenoise(pixels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    result = pixels.copy()
    places = rng.integers(0, result.size, int(share * result.size))
    result.flat[places[: len(places) // 2]] = 1
    result.flat[places[len(places) // 2 :]] = 0
    return result


def brighten(pixels: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    curve = middle_curve(amount)
    # The organizers' code exchanges red and blue here, and so does this.
    lab = cv2.cvtColor(np.ascontiguousarray(pixels[..., ::-1]), cv2.COLOR_RGB2Lab)
    lab[..., 0] = 100 * curve(lab[..., 0] / 100)
    encoded = cv2.cvtColor(lab, cv2.COLOR_Lab2RGB)[..., ::-1]
    return (2 * curve(pixels) + np.clip(encoded, 0, 1)) / 3


def darken(pixels: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    return middle_curve(-amount)(pixels)


def jitter(pixels: np.ndarray, sigma_px: float, rng: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[:2]
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    steps = torch.tensor([2 * sigma_px / (width - 1), 2 * sigma_px / (height - 1)])
    warped = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    for _ in range(5):
        moves = torch.from_numpy(rng.standard_normal((1, height, width, 2), np.float32)) * steps
        places = torch.stack([columns, rows], dim=-1) + moves
        warped = grid_sample(warped, places, mode="bilinear", padding_mode="border", align_corners=True)
    return warped[0].permute(1, 2, 0).numpy()


def quantization(pixels: np.ndarray, levels: int, rng: np.random.Generator) -> np.ndarray:
    thresholds = [0] + [int(255 * i / levels) for i in range(1, levels)]
    # The tolerance keeps what came from 8 bits on its side of a threshold.
    classes = np.searchsorted(np.float32(thresholds) + np.float32(1e-3), 255 * pixels, side="left")
    return (classes - classes.min()) / max(classes.max() - classes.min(), 1)


def lincontrchange(pixels: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    return contrast_curve(amount)(pixels)


_FUNCTIONS = [gausblur, lensblur, colorshift, colorsat, jpeg, whitenoise, impulsenoise, brighten, darken]
_FUNCTIONS += [jitter, quantization, lincontrchange]
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
