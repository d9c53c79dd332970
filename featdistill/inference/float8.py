"""Linear layers in 8-bit floats (e4m3): each row of the weights and of the inputs has a scale of its own.

An 8-bit product takes 0.62 of the time of a bfloat16 one on an H200. Quantising the inputs costs nearly as
much as that saves, unless it is fused into what comes before, which is what `--compile` does.
"""

import copy

import torch
from torch import Tensor, nn

from featdistill.command_line import UserError
from featdistill.models.expert import Expert

E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(E4M3).max
# The first GPUs with matrix products of e4m3 are those of compute capability 8.9 (Ada) and 9.0 (Hopper).
_CAPABILITY = (8, 9)
# What the matrix units take at once: both sides of a weight must be a multiple of it.
_MULTIPLE = 16
# What backbones call the list of their blocks, in timm and open_clip; a layer outside of it stays as it is.
_BLOCKS = {"blocks", "resblocks", "stages", "layers"}


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows as e4m3 and the scale of each: `quantised * scale` is about `values`.

    Args:
        values: (N, K) float.

    Returns:
        (N, K) e4m3 and (N, 1) float32.
    """
    largest = values.abs().amax(dim=1, keepdim=True).float()
    # A row of zeros keeps a scale that can be divided by.
    scale = largest.clamp(min=1e-12) / _LARGEST
    # Rounding can lift the largest value above what the type holds, which would be no number.
    return (values.float() / scale).clamp(-_LARGEST, _LARGEST).to(E4M3), scale


class Float8Linear(nn.Module):
    """What `linear` does, with its weight and its inputs in e4m3; the results are bfloat16.

    Args:
        linear: both of its sides are multiples of 16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantise(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().bfloat16())

    def forward(self, values: Tensor) -> Tensor:
        """Return (..., out) bfloat16 for (..., in) float."""
        rows, scale = quantise(values.flatten(0, -2))
        product = torch._scaled_mm(
            rows, self.weight.T, scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=torch.bfloat16
        )
        return product.unflatten(0, values.shape[:-1])


def with_float8(expert: Expert) -> Expert:
    """Return a copy of a bfloat16 expert with the linear layers of its blocks as `Float8Linear`."""
    expert = copy.deepcopy(expert)
    for name, module in list(expert.backbone.named_modules()):
        for child_name, child in module.named_children():
            is_in_block = not _BLOCKS.isdisjoint(name.split("."))
            # A subclass of Linear may be there for its weight alone, as in torch's MultiheadAttention.
            fits = type(child) is nn.Linear and not (
                child.in_features % _MULTIPLE or child.out_features % _MULTIPLE
            )
            if is_in_block and fits:
                setattr(module, child_name, Float8Linear(child))
    return expert


def require_float8(device: torch.device) -> None:
    """Raise a `UserError` where the device has no matrix products of e4m3."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise UserError(
            f"precision fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper), not {device}; "
            "give --precision bf16 or fp32"
        )
