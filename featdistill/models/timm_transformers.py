"""timm's plain transformers in steps, so that they can be read and resumed between any two blocks.

timm's own passes start at the image, and can only drop tokens at random. The steps here are those of
`forward_features` of `VisionTransformer`, `Eva` (DINOv3, EVA-02) and `Beit`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featdistill.models import encoders

PLAIN = (VisionTransformer, Eva, Beit)


def register_tokens(model: nn.Module) -> int:
    """Return the number of register tokens, which follow the class token."""
    table = getattr(model, "reg_token", None)
    return 0 if table is None else table.shape[1]


def embed(model: nn.Module, images: Tensor, keep: Tensor | None) -> Tensor:
    """Return all tokens (B, P + N, C) that the first block receives, of the patches only those in `keep`.

    Only a `VisionTransformer` can leave tokens out: the blocks of the others add positions themselves.
    """
    hidden = model.patch_embed(images)
    if isinstance(model, Beit):
        hidden = torch.cat([model.cls_token.expand(len(hidden), -1, -1), hidden], dim=1)
        return model.pos_drop(hidden if model.pos_embed is None else hidden + model.pos_embed)
    if isinstance(model, Eva):
        return model.norm_pre(model._pos_embed(hidden)[0])
    hidden = model._pos_embed(hidden)
    if keep is not None:
        hidden = encoders.keep_tokens(hidden, keep, model.num_prefix_tokens)
    return model.norm_pre(hidden)


def blocks(model: nn.Module, hidden: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """Return the blocks as functions of the tokens alone, for tokens like `hidden` (B, P + N, C)."""
    recomputes, positions = model.grad_checkpointing, _positions(model, hidden)
    return [
        partial(checkpoint, block, use_reentrant=False, **arguments)
        if recomputes
        else partial(block, **arguments)
        for block, arguments in zip(model.blocks, positions, strict=True)
    ]


def _positions(model: nn.Module, hidden: Tensor) -> list[dict[str, Any]]:
    """Return the arguments of each block that say where its tokens are."""
    depth = len(model.blocks)
    if isinstance(model, Beit):
        shared = None if model.rel_pos_bias is None else model.rel_pos_bias()
        return [{"shared_rel_pos_bias": shared}] * depth
    if not isinstance(model, Eva) or model.rope is None:
        return [{}] * depth
    if getattr(model.rope, "feat_shape", None):
        rope = model.rope.get_embed()
    else:
        side = math.isqrt(hidden.shape[1] - model.num_prefix_tokens)
        rope = model.rope.get_embed(shape=(side, side))
    return [
        {"rope": rope[number] if getattr(model, "rope_mixed", False) else rope} for number in range(depth)
    ]
