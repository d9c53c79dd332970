"""Parts of the training loop that need no trainer."""

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from featdistill.data.loading import make_loader
from featdistill.data.mixed_sizes import pieces
from featdistill.data.sampling import TrainBatches
from featdistill.data.train_dataset import TrainDataset
from featdistill.training.from_tokens import TokenDataset


def blank_batch(dataset: TrainDataset | TokenDataset) -> dict[str, Tensor]:
    """Return blank images or tokens for a process that has none: the others wait for its gradient."""
    blank = dataset.blank(2)
    numbers = torch.zeros(2, dtype=torch.int64)
    return blank | {"label": numbers.float(), "epoch": numbers, "index": numbers}


def seed_dropout(*numbers: int) -> None:
    """Make what dropout draws a function of some numbers, so that a continued run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def restore(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give buffers the values that they had."""
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def or_nan(loss: Tensor) -> Tensor:
    """Return the loss; if it is not finite, one whose gradient is not finite either.

    The cross-entropy of an infinite logit has a finite gradient. With this, the gradient's norm alone shows
    which steps to skip, on all processes.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def images_of_epoch(
    dataset: TrainDataset, batches: TrainBatches, epoch: int, steps: int, workers: int
) -> Iterator[Tensor]:
    """Yield the images (B, 3, S, S) of the first steps of an epoch, counted from 0, as they were in it."""
    batches = copy.copy(batches)
    batches.start = epoch * batches.steps_per_epoch
    batches.end = batches.start + min(steps, batches.steps_per_epoch)
    for batch in make_loader(dataset, batches, workers):
        if "images" in batch:
            yield from (piece for piece, _ in pieces(batch["images"], dataset.preprocessing.size))
