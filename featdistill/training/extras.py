"""Small networks that are trained with an expert and give further objectives; they are not part of it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, mse_loss

from featdistill.command_line import UserError
from featdistill.models import features
from featdistill.models.expert import Expert
from featdistill.models.features import Atom
from featdistill.recipe_groups import Objective
from featdistill.training.objectives import binary_cross_entropy


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


class LayerHeads(nn.Module):
    """Supervision of intermediate layers: a linear head on each of some atoms, for the loss alone.

    Atoms are normalized without affine parameters first (tokens before the last layer have a few huge
    channels). Shallow Real supervises 4 layers; how is ours.

    Args:
        text: the atoms, as a feature (see `features`): `layers:6,12,18,24`.

    Raises:
        UserError: this is not a feature that the expert's backbone has.
    """

    def __init__(self, expert: Expert, text: str) -> None:
        super().__init__()
        layout = features.layout(expert.backbone)
        feature = features.parse(text, layout)
        if feature.top_count:
            raise UserError(f"auxiliary_features '{text}': top_tokens is not possible here; use mean_tokens")
        self.atoms = feature.atoms
        self.heads = nn.ModuleList(nn.Linear(*layout.shape(atom), 1) for atom in self.atoms)

    def forward(self, values: Mapping[Atom, Tensor], label: Tensor, options: Objective) -> Tensor:
        """Return the mean over the heads of the cross-entropy of their logits with the label (B,).

        Args:
            values: contains the atoms, (B, C).
        """
        losses = []
        for atom, head in zip(self.atoms, self.heads, strict=True):
            logit = head(layer_norm(values[atom].float(), values[atom].shape[1:]))[:, 0]
            losses.append(binary_cross_entropy(logit.float(), label, options))
        return torch.stack(losses).mean()
