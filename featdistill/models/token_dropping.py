"""Vision transformers whose blocks get some of the patch tokens only, those that the caller names.

timm and open_clip can leave tokens out at random by themselves, not those that are asked for; so their
forward passes are written out here once more. A token has got its position before others are left out.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def tokens_at(tokens: Tensor, keep: Tensor) -> Tensor:
    """Return the tokens (B, K, C) at the places `keep` (B, K) int64, of (B, N, C)."""
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))


def timm_grid(model: nn.Module) -> int | None:
    """Return how many patches a side of the input of a timm model has; None where tokens are not patches."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    # Where layers differ in their resolution, patches are merged on the way.
    steps = {layer["reduction"] for layer in getattr(model, "feature_info", None) or ()}
    return grid[0] if grid and len(steps) == 1 else None


def timm_can(model: nn.Module) -> bool:
    """Return whether `timm_intermediates` knows a timm model.

    It does not know BEiT and Eva, whose blocks hold positions of their own.
    """
    return isinstance(model, VisionTransformer)


def timm_intermediates(
    model: nn.Module, images: Tensor, layers: int, keep: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return features as `forward_features` does, and the patch tokens (B, K, C) of the last layers.

    Raises:
        ValueError: the model is of another kind.
    """
    if not timm_can(model):
        raise ValueError(f"{type(model).__name__} cannot leave tokens out")
    prefix = model.num_prefix_tokens
    hidden = model.norm_pre(_kept(model._pos_embed(model.patch_embed(images)), keep, prefix))
    first = len(model.blocks) - layers
    tokens = []
    for number, block in enumerate(model.blocks):
        again = model.grad_checkpointing
        hidden = checkpoint(block, hidden, use_reentrant=False) if again else block(hidden)
        if number >= first:
            tokens.append(hidden[:, prefix:])
    return model.norm(hidden), tokens


def open_clip_intermediates(
    visual: nn.Module, images: Tensor, layers: int, keep: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the embedding (B, D) of open_clip's own transformer, and tokens as `timm_intermediates`."""
    hidden = _kept(visual._embeds(images), keep, 1)
    hidden, tokens = visual.transformer.forward_intermediates(hidden, indices=layers)
    pooled, _ = visual._pool(hidden)
    return pooled if visual.proj is None else pooled @ visual.proj, [layer[:, 1:] for layer in tokens]


def _kept(hidden: Tensor, keep: Tensor, prefix: int) -> Tensor:
    """Return the `prefix` first tokens and those of the patches at `keep`."""
    return torch.cat([hidden[:, :prefix], tokens_at(hidden[:, prefix:], keep)], dim=1)
