"""What a student is held against in stage 2."""

import torch
from torch import Tensor, nn

from featdistill.experts import Expert


class FrozenTeacher(nn.Module):
    """The stage-1 expert as it is: evaluation mode for good, no gradient (paper, section 4.7)."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.expert = expert.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in evaluation mode, whatever the task around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the patch tokens (B, N, C) of images (B, 3, S, S)."""
        return self.expert.encode(images).tokens[-1]
