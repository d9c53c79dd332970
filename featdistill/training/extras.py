"""Small networks that are trained with an expert and give further objectives; they are not part of it."""

from torch import Tensor, nn
from torch.nn.functional import mse_loss

from featdistill.models.expert import Expert


class FeatureConsistency(nn.Module):
    """||g(distorted feature) - clean feature||^2, mean over batch and values, with a small network g.

    TeleAI-TeleGuard's description names the loss and its weight, .25; the rest is ours: g has one hidden
    layer, and the clean feature is a target without gradient, as in `objectives.consistency`.
    """

    def __init__(self, expert: Expert, hidden: int) -> None:
        super().__init__()
        width = expert.feature_dim
        self.network = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, clean: Tensor, distorted: Tensor) -> Tensor:
        """Compare features (B, D) in float32; gradients flow through the distorted one."""
        return mse_loss(self.network(distorted).float(), clean.detach().float())
