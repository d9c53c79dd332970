"""The teachers of stage 2.

None of them has a gradient, and all stay in evaluation mode, whatever the mode of the task around them.
"""

import math

import torch
from torch import Tensor, nn

from featdistill.inference import compute
from featdistill.models.expert import Encoded, Expert


def momentum_at(step: int, total: int, base: float, maximum: float) -> float:
    """Paper, eq. 5: m = m_max - (m_max - m_base) (cos(pi step / total) + 1) / 2.

    Args:
        step: optimizer steps before this one: at 0 the momentum is `base`, at `total` it is `maximum`.
    """
    return maximum - (maximum - base) * (math.cos(math.pi * step / total) + 1) / 2


@torch.no_grad()
def follow(follower: nn.Module, source: nn.Module, momentum: float) -> None:
    """Set all parameters to momentum * follower + (1 - momentum) * source, and copy the buffers.

    Both have the same architecture, in float32: a shorter type would round away steps of 1e-4.
    """
    torch._foreach_lerp_(list(follower.parameters()), list(source.parameters()), 1 - momentum)
    for buffer, new in zip(follower.buffers(), source.buffers(), strict=True):
        buffer.copy_(new)


class Untrained(nn.Module):
    """Holds an expert without gradient, always in evaluation mode."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.expert = expert.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Untrained":
        """Stay in evaluation mode."""
        return super().train(False)


class FrozenTeacher(Untrained):
    """The stage-1 expert as it is (paper, section 4.7)."""

    # Whether it changes in training, so that a killed run needs it.
    moves = False
    # Whether its weights have the type in which it computes.
    is_cast = False

    @torch.no_grad()
    def forward(self, images: Tensor, layers: int = 1) -> Encoded:
        """Return `Expert.encode` of images (B, 3, S, S)."""
        if self.is_cast:
            with torch.autocast(images.device.type, enabled=False):
                return self.expert.encode(images, layers)
        return self.expert.encode(images, layers)

    def follow(self, student: Expert, momentum: float) -> None:
        """Stay as it is."""


class MomentumTeacher(FrozenTeacher):
    """A teacher that starts as the stage-1 expert and follows the student (paper, section 5.1, eq. 5)."""

    moves = True

    def follow(self, student: Expert, momentum: float) -> None:
        """Move towards the student by 1 - momentum; see `momentum_at`."""
        follow(self.expert, student, momentum)


def cast_frozen(task: nn.Module, precision: str) -> None:
    """In bf16, cast the backbones of frozen teachers, as for scoring: less memory, and no casting at a step.

    Teachers that move need float32, see `follow`.

    Args:
        precision: of the run; with sharded weights, which have one type, fp32.
    """
    for module in task.modules():
        if precision == "bf16" and isinstance(module, FrozenTeacher) and not module.moves:
            compute.cast(module.expert, precision)
            module.is_cast = True
