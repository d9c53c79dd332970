"""Small versions of the paper's two transformers, and a smaller student, for the demo and the tests.

`clip` has a class token and a projection, `siglip` attention pooling and no class token. `student` is like
`clip`, with about a third of its operations and without the projection. Instead of a patch
embedding they have a convolutional stem on the image and its high-pass residual, so that random weights learn
local traces within a minute from a few thousand images.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from featdistill.command_line import UserError

_STRIDE_PX = 16  # the stem halves the resolution four times
_KINDS = {
    "clip": {"global_pool": "token", "class_token": True, "num_classes": 64},
    "siglip": {"global_pool": "map", "class_token": False, "num_classes": 0},
    "student": {"global_pool": "token", "class_token": True, "num_classes": 0},
}
# Widths of the stem, the last of which is that of the tokens.
_WIDTHS = {"clip": (24, 48, 64, 96), "siglip": (24, 48, 64, 96), "student": (12, 24, 48, 64)}
_HEAD_WIDTH = 32


def tiny_transformer(kind: str, size: int, **options: Any) -> VisionTransformer:
    """Build one with random weights.

    Args:
        kind: `clip`, `siglip` or `student`.
        size: side of the input in px, a multiple of 16.
        options: further arguments of timm's `VisionTransformer`.

    Raises:
        UserError: the size does not fit.
    """
    if size < _STRIDE_PX or size % _STRIDE_PX:
        raise UserError(f"input size {size} px of tiny_{kind} is not a multiple of {_STRIDE_PX} px")
    model = VisionTransformer(
        img_size=size,
        patch_size=1,
        embed_dim=_WIDTHS[kind][-1],
        depth=2,
        num_heads=_WIDTHS[kind][-1] // _HEAD_WIDTH,
        mlp_ratio=2.0,
        embed_layer=partial(HybridEmbed, backbone=_convolutional_stem(_WIDTHS[kind])),
        **(_KINDS[kind] | options),
    )
    # With the standard deviation 0.02 of large transformers, gradients of one this narrow vanish.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


class HighPass(nn.Module):
    """Append 4 times the difference from the mean of 3 x 3 pixels: (B, 3, S, S) -> (B, 6, S, S)."""

    def forward(self, images: Tensor) -> Tensor:
        smooth = avg_pool2d(pad(images, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
        return torch.cat([images, 4 * (images - smooth)], dim=1)


def _convolutional_stem(widths: tuple[int, ...]) -> nn.Sequential:
    """Return convolutions of stride 2; BatchNorm lets the transformer after them learn at once."""
    layers: list[nn.Module] = [HighPass()]
    for before, width in zip((6, *widths[:-1]), widths, strict=True):
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)
