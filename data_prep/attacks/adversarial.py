"""Attacks on an expert within a budget: it assigns the other class to images that look the same.

The attack changes the pixels of the image itself, not the expert's input. The steps in between (resize and
crop, see `preprocessing.fit`) are linear in each direction apart from rounding, so they are written as two
matrices, and the gradient is propagated through these. So the perturbation need not be enlarged afterwards,
keeps its budget exactly, and is of the same kind in images of every size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate

from featdistill.data.preprocessing import offset, prepare
from featdistill.models.expert import Expert


@dataclass(frozen=True)
class Attack:
    """How an image is changed.

    `pgd` (Madry et al., ICLR 2018) starts anywhere within the budget and follows the sign of the gradient;
    `mi-pgd` (MI-FGSM of Dong et al., CVPR 2018) starts at the image and follows the sign of the accumulated
    gradients, which often transfers better to other models.
    """

    method: str = "pgd"
    epsilon: int = 4  # budget: the largest change of a pixel in any channel, in 8-bit steps
    steps: int = 10
    # In 8-bit steps; None for the papers' 2.5 epsilon / steps (`pgd`) and epsilon / steps (`mi-pgd`).
    step_size: float | None = None
    momentum: float = 1.0  # decay of the accumulated gradients of `mi-pgd`; 1 in the paper


def attack(
    expert: Expert,
    images: Sequence[np.ndarray],
    towards_ai: Sequence[bool],
    settings: Attack,
    generators: Sequence[np.random.Generator],
) -> list[np.ndarray]:
    """Change images so that the expert assigns them to a class.

    Pixels that the expert does not see (outside its crop) change only by the start of `pgd`.

    Args:
        expert: in evaluation mode.
        images: N arrays (H, W, 3) uint8 RGB of any sizes.
        towards_ai: for each image, whether P(AI) should rise or fall.
        generators: for each image, the source of its random start.

    Returns:
        N uint8 arrays of the images' shapes, within `epsilon` of them.
    """
    device = next(expert.parameters()).device
    clean = [torch.from_numpy(image).to(device).permute(2, 0, 1).float() for image in images]
    views = [input_matrices(*image.shape[:2], *expert.preprocessing.key) for image in images]
    views = [tuple(matrix.to(device) for matrix in matrices) for matrices in views]
    sign = torch.tensor([1.0 if rises else -1.0 for rises in towards_ai], device=device)
    size = settings.step_size or (2.5 if settings.method == "pgd" else 1) * settings.epsilon / settings.steps
    changes = [torch.zeros_like(image) for image in clean]
    if settings.method == "pgd":
        for row, (rng, image) in enumerate(zip(generators, images, strict=True)):
            start = rng.uniform(-settings.epsilon, settings.epsilon, (3, *image.shape[:2]))
            changes[row] = torch.from_numpy(start.astype(np.float32)).to(device)
    momenta = [torch.zeros_like(image) for image in clean]
    with reproducible():
        for _ in range(settings.steps):
            pairs = zip(clean, changes, strict=True)
            pixels = [(image + change).clamp(0, 255).requires_grad_() for image, change in pairs]
            squares = [see(image, *matrices) for image, matrices in zip(pixels, views, strict=True)]
            # Each logit depends on its own image alone, so one backward pass is enough. The logit instead of
            # a loss: where the expert is confident, the gradient of a loss vanishes.
            gradients = torch.autograd.grad((sign * expert(torch.stack(squares) / 255)).sum(), pixels)
            for row, gradient in enumerate(gradients):
                if settings.method == "mi-pgd":
                    scale = gradient.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
                    momenta[row] = gradient = settings.momentum * momenta[row] + gradient / scale
                change = changes[row] + size * gradient.sign()
                changes[row] = change.clamp(-settings.epsilon, settings.epsilon)
    pairs = zip(clean, changes, strict=True)
    attacked = [(image + change.round()).clamp(0, 255).to(torch.uint8) for image, change in pairs]
    return [np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()) for image in attacked]


def score(expert: Expert, images: Sequence[np.ndarray]) -> np.ndarray:
    """Return P(AI) of N images (H, W, 3) uint8 as `predict.py` computes it: (N,) float64."""
    device = next(expert.parameters()).device
    squares = torch.stack([prepare(image, *expert.preprocessing.key) for image in images])
    with torch.inference_mode(), reproducible():
        return expert(squares.to(device)).double().sigmoid().cpu().numpy()


def see(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the expert's view (3, S, S) of an image (3, H, W), both float in [0, 255].

    The gradient passes the clamp, so that black and white pixels can change too.
    """
    square = rows @ image @ columns.T
    return square + (square.clamp(0, 255) - square).detach()


@lru_cache(maxsize=64)
def input_matrices(
    height: int, width: int, size: int, resize: str, max_side_px: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the effect of `preprocessing.fit`, centered, on the rows and columns of an image as matrices.

    Args:
        height, width: of the image in px.
        size: side S of the expert's input in px.
        resize: see `Preprocessing`.
        max_side_px: the expert's limit; the image must be within it.

    Returns:
        (S, H) and (S, W) float32.
    """
    shorter = min(height, width)
    return tuple(_axis_matrix(side, shorter, size, resize) for side in (height, width))


def _axis_matrix(side: int, shorter: int, size: int, resize: str) -> Tensor:
    if resize == "crop":
        whole = side * -(-size // side)
        return torch.eye(side)[(torch.arange(size) + offset(0.5, whole - size)) % side]
    target = size if resize == "squash" else size * side // shorter
    matrix = torch.eye(side)
    if target != side:
        # One direction at a time: the other one keeps its length and so its values.
        matrix = interpolate(matrix[None, None], (target, side), mode="bicubic", antialias=True)[0, 0]
    top = offset(0.5, target - size)
    return matrix[top : top + size].clone()


@contextmanager
def reproducible() -> Iterator[None]:
    """Use only deterministic kernels; others let a GPU add in any order."""
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with cudnn, sdpa_kernel(SDPBackend.MATH):
        yield
