"""Attacks on an expert within a budget: images it takes for the other class although they look the same.

The attack is on the pixels of the image itself, not on the expert's input. What lies between the two (resize
and crop, see `preprocessing.fit`) is linear in each direction apart from rounding, so it is written as two
matrices, and the gradient goes back through them. That way the perturbation does not have to be enlarged
afterwards, keeps its budget exactly, and is of the same kind in images of every size.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate

from featdistill.data.preprocessing import offset, prepare
from featdistill.models.expert import Expert

METHODS = ("pgd", "mi-pgd")


@dataclass(frozen=True)
class Attack:
    """How an image is changed.

    Attributes:
        method: `pgd` (Madry et al., ICLR 2018): starts anywhere in the budget and goes along the sign of the
            gradient; `mi-pgd` (MI-FGSM of Dong et al., CVPR 2018): starts at the image and goes along the
            sign of all gradients so far, which often transfers better to other models.
        epsilon: budget; no pixel changes by more than this in any channel, in 8-bit steps.
        steps: how many there are.
        step_size: of each, in 8-bit steps; None for what the papers take: 2.5 epsilon / steps for `pgd`,
            epsilon / steps for `mi-pgd`.
        momentum: what is kept of the gradients so far at each step of `mi-pgd`; 1 in the paper.
    """

    method: str = "pgd"
    epsilon: int = 4
    steps: int = 10
    step_size: float | None = None
    momentum: float = 1.0


def attack(
    expert: Expert,
    images: Sequence[np.ndarray],
    towards_ai: Sequence[bool],
    settings: Attack,
    generators: Sequence[np.random.Generator],
) -> list[np.ndarray]:
    """Change images so that the expert takes them for the class given.

    Pixels that the expert does not see (outside its crop) are only changed by where `pgd` starts.

    Args:
        expert: in evaluation mode.
        images: N arrays (H, W, 3) uint8 RGB of any sizes.
        towards_ai: N times, whether P(AI) is to rise or to fall.
        generators: N times, what the start is drawn from.

    Returns:
        N arrays of the images' shapes, uint8, within `epsilon` of them.
    """
    device = next(expert.parameters()).device
    clean = [torch.from_numpy(image).to(device).permute(2, 0, 1).float() for image in images]
    views = [input_matrices(*image.shape[:2], *expert.preprocessing.key) for image in images]
    views = [tuple(matrix.to(device) for matrix in matrices) for matrices in views]
    sign = torch.tensor([1.0 if rises else -1.0 for rises in towards_ai], device=device)
    size = settings.step_size or (2.5 if settings.method == "pgd" else 1) * settings.epsilon / settings.steps
    changes = [torch.zeros_like(image) for image in clean]
    if settings.method == "pgd":
        starts = [
            rng.uniform(-settings.epsilon, settings.epsilon, (3, *image.shape[:2])).astype(np.float32)
            for rng, image in zip(generators, images, strict=True)
        ]
        changes = [torch.from_numpy(start).to(device) for start in starts]
    momenta = [torch.zeros_like(image) for image in clean]
    with reproducible():
        for _ in range(settings.steps):
            pixels = [
                (image + change).clamp(0, 255).requires_grad_()
                for image, change in zip(clean, changes, strict=True)
            ]
            squares = [see(image, *matrices) for image, matrices in zip(pixels, views, strict=True)]
            # Each logit depends on its own image alone, so that one backward pass serves all of them. The
            # logit and not a loss of it: where the expert is sure, the gradient of a loss vanishes.
            gradients = torch.autograd.grad((sign * expert(torch.stack(squares) / 255)).sum(), pixels)
            for row, gradient in enumerate(gradients):
                if settings.method == "mi-pgd":
                    scale = gradient.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
                    momenta[row] = gradient = settings.momentum * momenta[row] + gradient / scale
                change = changes[row] + size * gradient.sign()
                changes[row] = change.clamp(-settings.epsilon, settings.epsilon)
    attacked = [
        (image + change.round()).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        for image, change in zip(clean, changes, strict=True)
    ]
    return [np.ascontiguousarray(image.cpu().numpy()) for image in attacked]


def score(expert: Expert, images: Sequence[np.ndarray]) -> np.ndarray:
    """Return P(AI) of N images (H, W, 3) uint8 as `predict.py` finds it: (N,) float64."""
    device = next(expert.parameters()).device
    squares = torch.stack([prepare(image, *expert.preprocessing.key) for image in images])
    with torch.inference_mode(), reproducible():
        return expert(squares.to(device)).double().sigmoid().cpu().numpy()


def see(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return what the expert sees of an image (3, H, W) float in [0, 255]: (3, S, S), in the same range.

    The gradient passes the limits of the range: else a pixel that is black or white could never be changed.
    """
    square = rows @ image @ columns.T
    return square + (square.clamp(0, 255) - square).detach()


@lru_cache(maxsize=64)
def input_matrices(height: int, width: int, size: int, resize: str) -> tuple[Tensor, Tensor]:
    """Return what `preprocessing.fit` does to the rows and to the columns of an image, in the middle of it.

    Args:
        height, width: of the image in px.
        size: side S of the expert's input in px.
        resize: see `Preprocessing`.

    Returns:
        (S, H) and (S, W) float32.
    """
    shorter = min(height, width)
    return tuple(_axis_matrix(side, shorter, size, resize) for side in (height, width))


def _axis_matrix(side: int, shorter: int, size: int, resize: str) -> Tensor:
    if resize == "crop":
        whole = side * -(-size // side)
        places = (torch.arange(size) + offset(0.5, whole - size)) % side
        return torch.eye(side)[places]
    target = size if resize == "squash" else size * side // shorter
    matrix = torch.eye(side)
    if target != side:
        # One direction at a time: the other one keeps its length, which leaves it as it is.
        matrix = interpolate(matrix[None, None], (target, side), mode="bicubic", antialias=True)[0, 0]
    top = offset(0.5, target - size)
    return matrix[top : top + size].clone()


@contextmanager
def reproducible() -> Iterator[None]:
    """Take only kernels that give the same result every time; elsewhere a GPU adds up in any order."""
    with ExitStack() as stack:
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
