"""GELU inside the matrix product before it, as cuBLASLt can: no pass over the results for the activation."""

import copy

import torch
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn

from featdistill.models.expert import Expert


class GeluLinear(nn.Module):
    """A linear layer and GELU in one call; on a GPU GELU's tanh approximation."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, values: Tensor) -> Tensor:
        """Return (..., out) for (..., in)."""
        rows = values.flatten(0, -2)
        product = torch._addmm_activation(self.bias, rows, self.weight.T, use_gelu=True)
        return product.unflatten(0, values.shape[:-1])


def with_fused_gelu(expert: Expert) -> Expert:
    """Return a copy of an expert whose MLPs with tanh-approximated GELU, as SigLIP's, compute it so."""
    expert = copy.deepcopy(expert)
    for mlp in expert.backbone.modules():
        is_gelu = isinstance(mlp, Mlp) and (
            isinstance(mlp.act, GELUTanh) or getattr(mlp.act, "approximate", "none") == "tanh"
        )
        if is_gelu and isinstance(mlp.norm, nn.Identity):
            mlp.fc1, mlp.act = GeluLinear(mlp.fc1), nn.Identity()
    return expert
