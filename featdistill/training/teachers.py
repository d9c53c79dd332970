"""Networks that stand beside the student: what it is held against in stage 2, and the average of its weights.

None of them gets a gradient, and all stay in evaluation mode, whatever the task around them does.
"""

import copy
import math

import torch
from torch import Tensor, nn

from featdistill.models.expert import Encoded, Expert


def momentum_at(step: int, total: int, base: float, most: float) -> float:
    """Paper, eq. 5: m = m_max - (m_max - m_base) (cos(pi step / total) + 1) / 2.

    Args:
        step: optimiser steps done before this one: at 0 the momentum is `base`, at `total` it is `most`.
    """
    return most - (most - base) * (math.cos(math.pi * step / total) + 1) / 2


def average_decay_at(step: int, decay: float) -> float:
    """Return min(decay, (1 + step) / (10 + step)), so that the first weights are forgotten soon.

    It is the usual warm-up of a moving average (that of TensorFlow's `ExponentialMovingAverage`).
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def follow(follower: nn.Module, source: nn.Module, momentum: float) -> None:
    """follower <- momentum * follower + (1 - momentum) * source, for all parameters; buffers are copied.

    Both are of one architecture, in float32: in a shorter type, steps of 1e-4 would be rounded away.
    """
    torch._foreach_lerp_(list(follower.parameters()), list(source.parameters()), 1 - momentum)
    for kept, new in zip(follower.buffers(), source.buffers(), strict=True):
        kept.copy_(new)


class _Still(nn.Module):
    """Holds an expert without gradient, in evaluation mode for good."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.expert = expert.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "_Still":
        """Stay in evaluation mode."""
        return super().train(False)


class FrozenTeacher(_Still):
    """The stage-1 expert as it is (paper, section 4.7)."""

    # Whether it changes in training, so that a killed run needs it.
    moves = False

    @torch.no_grad()
    def forward(self, images: Tensor, layers: int = 1) -> Encoded:
        """Return what `Expert.encode` makes of images (B, 3, S, S)."""
        return self.expert.encode(images, layers)

    def follow(self, student: Expert, momentum: float) -> None:
        """Stay as it is."""


class MomentumTeacher(FrozenTeacher):
    """A teacher that starts as the stage-1 expert and follows the student (paper, section 5.1, eq. 5)."""

    moves = True

    def follow(self, student: Expert, momentum: float) -> None:
        """Move towards the student by 1 - momentum; see `momentum_at`."""
        follow(self.expert, student, momentum)


class WeightAverage(_Still):
    """Exponential moving average of the student's weights, which is scored and saved in its place.

    It teaches nothing: a momentum teacher beside it has a schedule of its own.
    """

    def __init__(self, student: Expert, decay: float) -> None:
        super().__init__(copy.deepcopy(student))
        self.decay = decay

    def update(self, student: Expert, step: int) -> None:
        """Take in the weights after an optimiser step, counted from 0."""
        follow(self.expert, student, average_decay_at(step, self.decay))
