"""Linear layers in 8-bit floats (e4m3): each row of the weights and of the inputs has a scale of its own.

An 8-bit product takes 0.62 of the time of a bfloat16 one on an H200. Quantizing the inputs costs nearly as
much as that saves, unless `--compile` fuses it into the operation before.
"""

import copy

import torch
from torch import Tensor, nn

from featdistill.command_line import UserError
from featdistill.models.expert import Expert, called_linear_layers

E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(E4M3).max
# The first GPUs with matrix products of e4m3 are those of compute capability 8.9 (Ada) and 9.0 (Hopper).
_CAPABILITY = (8, 9)
# The matrix units need both sides of a weight to be a multiple of this.
_MULTIPLE = 16
# Names of the list of blocks in timm and open_clip; layers outside it stay as they are.
_BLOCKS = {"blocks", "resblocks", "stages", "layers"}


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return `values` (N, K) as e4m3 and a scale per row, (N, 1) float32; their product is about `values`."""
    largest = values.abs().amax(dim=1, keepdim=True).float()
    # A row of zeros must not divide by zero.
    scale = largest.clamp(min=1e-12) / _LARGEST
    # Rounding can lift the largest value above what the type can hold, which would be NaN.
    return (values.float() / scale).clamp(-_LARGEST, _LARGEST).to(E4M3), scale


class Float8Linear(nn.Module):
    """`linear`, whose sides are multiples of 16, with weight and inputs in e4m3; the results are bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().bfloat16())

    def forward(self, values: Tensor) -> Tensor:
        """Return (..., out) bfloat16 for (..., in) float."""
        rows, scale = quantize(values.flatten(0, -2))
        product = torch._scaled_mm(
            rows, self.weight.T, scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=torch.bfloat16
        )
        return product.unflatten(0, values.shape[:-1])


def with_float8(expert: Expert) -> Expert:
    """Return a copy of a bfloat16 expert with the linear layers of its blocks as `Float8Linear`.

    Layers whose weight is read without calling them stay as they are.
    """
    expert = copy.deepcopy(expert)
    for name in called_linear_layers(expert):
        layer = expert.backbone.get_submodule(name)
        is_in_block = not _BLOCKS.isdisjoint(name.split(".")[:-1])
        if is_in_block and layer.in_features % _MULTIPLE == layer.out_features % _MULTIPLE == 0:
            expert.backbone.set_submodule(name, Float8Linear(layer))
    return expert


def require_float8(device: torch.device) -> None:
    """Raise a `UserError` if the device has no matrix products of e4m3."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise UserError(
            f"precision fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper), not {device}; "
            "use --precision bf16 or fp32"
        )
