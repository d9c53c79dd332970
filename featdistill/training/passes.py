"""Parts of a training step that need no trainer."""

import math

import torch
from torch import Tensor

from featdistill.data.train_dataset import TrainDataset


def blank_batch(dataset: TrainDataset) -> dict[str, Tensor]:
    """Return black images for a process that has none: the others wait for its gradient."""
    size = dataset.preprocessing.size
    views = ["images", *(f"images_{view}" for view in dataset.views)]
    blank = {view: torch.zeros(2, 3, size, size, dtype=torch.uint8) for view in views}
    numbers = torch.zeros(2, dtype=torch.int64)
    return blank | {"label": numbers.float(), "epoch": numbers, "index": numbers}


def or_nan(loss: Tensor) -> Tensor:
    """Return the loss; if it is not finite, one whose gradient is not finite either.

    The cross-entropy of an infinite logit has a finite gradient. With this, the gradient's norm alone shows
    which steps to skip, on all processes.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
