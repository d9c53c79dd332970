"""Attention heads made wider with zeros: the same function, for kernels that prefer other widths."""

import copy
import math

import torch
from timm.models.vision_transformer import Attention
from torch import nn

from featdistill.models.expert import Expert


def with_head_width(expert: Expert, width: int) -> Expert:
    """Return a copy of a float32 expert whose attention heads of fewer than `width` values have `width`.

    The added rows of the projection to queries, keys and values, and columns of the one after attention, are
    zero. PyTorch's attention divides by the root of the head's width, so the queries' rows are scaled by the
    root of the ratio. Logits stay the same up to rounding. Only timm's own attention without further norms is
    changed, as CLIP's and SigLIP's.
    """
    expert = copy.deepcopy(expert)
    for module in expert.backbone.modules():
        if type(module) is Attention and module.head_dim < width and _is_plain(module):
            _widen(module, width)
    return expert


def _is_plain(attention: Attention) -> bool:
    parts = (getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate"))
    return attention.fused_attn and all(part is None or isinstance(part, nn.Identity) for part in parts)


@torch.no_grad()
def _widen(attention: Attention, width: int) -> None:
    heads, narrow = attention.num_heads, attention.head_dim
    qkv, projection = attention.qkv, attention.proj

    def padded(values: torch.Tensor) -> torch.Tensor:
        """Return (3 * heads * narrow, ...) as (3 * heads * width, ...)."""
        rows = values.unflatten(0, (3, heads, narrow))
        wide = values.new_zeros((3, heads, width, *values.shape[1:]))
        wide[:, :, :narrow] = rows
        wide[0] *= math.sqrt(width / narrow)
        return wide.flatten(0, 2)

    qkv.weight = nn.Parameter(padded(qkv.weight), requires_grad=False)
    if qkv.bias is not None:
        qkv.bias = nn.Parameter(padded(qkv.bias), requires_grad=False)
    columns = projection.weight.unflatten(1, (heads, narrow))
    wide = columns.new_zeros((len(columns), heads, width))
    wide[:, :, :narrow] = columns
    projection.weight = nn.Parameter(wide.flatten(1), requires_grad=False)
    qkv.out_features, projection.in_features = 3 * heads * width, heads * width
    attention.head_dim, attention.attn_dim = width, heads * width
