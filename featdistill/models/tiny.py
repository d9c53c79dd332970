"""Two small transformers of the paper's two kinds, for the demo and the tests.

`clip` has a class token and a projection, `siglip` attention pooling and no class token. A convolutional stem
on the image and its high-pass residual takes the place of the patch embedding, so that they learn local
traces from random weights, a few thousand images and a minute.
"""

from functools import partial

import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from featdistill.command_line import UserError

STRIDE_PX = 16  # the stem halves the resolution four times
_KINDS = {
    "clip": {"global_pool": "token", "class_token": True, "num_classes": 64},
    "siglip": {"global_pool": "map", "class_token": False, "num_classes": 0},
}


def tiny_transformer(kind: str, size: int) -> VisionTransformer:
    """Build one with random weights.

    Args:
        kind: `clip` or `siglip`.
        size: side of the input in px, a multiple of 16.

    Raises:
        UserError: the size is no such multiple.
    """
    if size < STRIDE_PX or size % STRIDE_PX:
        raise UserError(f"input size {size} px is no multiple of the {STRIDE_PX} px a token of tiny_{kind}")
    model = VisionTransformer(
        img_size=size,
        patch_size=1,
        embed_dim=96,
        depth=2,
        num_heads=3,
        mlp_ratio=2.0,
        embed_layer=partial(HybridEmbed, backbone=_convolutional_stem((24, 48, 64, 96))),
        **_KINDS[kind],
    )
    # The usual 0.02 of large transformers leaves a gradient of next to nothing in one this narrow.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


class HighPass(nn.Module):
    """Add the residual against the mean of 3 x 3 pixels, times 4: (B, 3, S, S) -> (B, 6, S, S)."""

    def forward(self, images: Tensor) -> Tensor:
        smooth = avg_pool2d(pad(images, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
        return torch.cat([images, 4 * (images - smooth)], dim=1)


def _convolutional_stem(widths: tuple[int, ...]) -> nn.Sequential:
    """Halve the resolution once a layer; BatchNorm lets the transformer behind it learn at once."""
    layers: list[nn.Module] = [HighPass()]
    for before, width in zip((6, *widths[:-1]), widths, strict=True):
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)
