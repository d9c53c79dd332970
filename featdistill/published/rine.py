"""RINE (Koutlis and Papadopoulos, ECCV 2024): what all blocks of OpenAI's CLIP ViT-L/14 see, weighted.

Code and heads: Apache-2.0; github.com/mever-team/rine at 9b7fd5857cc205d0412be6aeee0d7611b95bd620. The head
gets the class token of every block, between the block's attention and its MLP, after the norm there. It sees
the middle of the image, not resized. The heads differ in what they were trained on, in depth and in width.
"""

import dataclasses
from functools import partial

import torch
from torch import Tensor, nn

from featdistill.command_line import UserError
from featdistill.models import timm_transformers
from featdistill.models.backbones import BACKBONES
from featdistill.models.encoders import Backbone, BackboneSpec, Reading
from featdistill.models.expert import Expert
from featdistill.models.timm_encoders import TimmBackbone
from featdistill.published.entry import Published, Source

# Of training; it has no effect on scores.
_DROPOUT = 0.5


class RineBackbone(TimmBackbone):
    """A CLIP transformer of timm; its pooled feature is the class token after `norm2` of each block."""

    def __init__(self, clip: TimmBackbone) -> None:
        super().__init__(clip.model, "pool", clip.input_size, clip.mean, clip.std)
        self.width = self.feature_dim
        self.feature_dim = self.depth * self.width

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, depth * C), block by block, and the last layer's patch tokens (B, N, C)."""
        hidden, seen = timm_transformers.embed(self.model, images, None), []
        for block in self.model.blocks:
            hidden = hidden + block.attn(block.norm1(hidden))
            normalized = block.norm2(hidden)
            seen.append(normalized[:, 0])
            hidden = hidden + block.mlp(normalized)
        return torch.cat(seen, dim=1), self.model.norm(hidden)[:, self.model.num_prefix_tokens :]

    def read(self, *_args: object, **_settings: object) -> Reading:
        raise UserError("RINE only gives scores: it reads its backbone inside the blocks")


class Blend(nn.Module):
    """From the class tokens of all blocks (B, depth * C) to one embedding (B, dim)."""

    def __init__(self, depth: int, width: int, layers: int, dim: int) -> None:
        super().__init__()
        self.depth = depth
        self.alpha = nn.Parameter(torch.zeros(1, depth, dim))
        self.proj1, self.proj2 = _projection(width, layers, dim), _projection(dim, layers, dim)

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.proj1(features.unflatten(1, (self.depth, -1)))
        return self.proj2((self.alpha.softmax(dim=1) * tokens).sum(dim=1))


def _projection(width: int, layers: int, dim: int) -> nn.Sequential:
    modules: list[nn.Module] = [nn.Dropout(_DROPOUT)]
    for number in range(layers):
        modules += [nn.Linear(dim if number else width, dim), nn.ReLU(), nn.Dropout(_DROPOUT)]
    return nn.Sequential(*modules)


def _make(backbone: Backbone, spec: BackboneSpec, resize: str, layers: int, dim: int) -> Expert:
    backbone = RineBackbone(backbone)
    expert = Expert(backbone, spec, 0, _DROPOUT, resize)
    hidden = [[nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(_DROPOUT)] for _ in range(2)]
    blend = Blend(backbone.depth, backbone.width, layers, dim)
    expert.head = nn.Sequential(blend, *hidden[0], *hidden[1], nn.Linear(dim, 1))
    return expert


def _name_in_file(name: str) -> str | None:
    part, _, rest = name.partition(".")
    if part != "head":
        return None
    number, _, rest = rest.partition(".")
    return rest if number == "0" else f"head.{int(number) - 1}.{rest}"


def _entry(trained_on: str, layers: int, dim: int, parameters: int, **hashes: str | float) -> Published:
    return Published(
        f"RINE {trained_on}, CLIP ViT-L/14",
        "Apache-2.0",
        Source(
            "github.com",
            "mever-team/rine",
            "9b7fd5857cc205d0412be6aeee0d7611b95bd620",
            f"ckpt/model_{trained_on}_trainable.pth",
        ),
        parameters,
        dataclasses.replace(BACKBONES["clip_l14"], feature="pool", input_size=224),
        "pad",
        has_backbone=False,
        make=partial(_make, layers=layers, dim=dim),
        name_in_file=_name_in_file,
        **hashes,
    )


DETECTORS = {
    "rine_4class": _entry("4class", 2, 1024, 6_323_201, git_blob="bf5cd4053b5eaf64a0bd52cdb6bd0dbd9a8bc457"),
    "rine_2class": _entry(
        "2class",
        4,
        128,
        283_009,
        sha256="680d301b6d191da85b9dabcebf42cd3df20c5c669fa8320c498f835d02bf5ccb",
        golden_logit=-2.1957588,
    ),
    "rine_1class": _entry("1class", 4, 1024, 10_521_601, git_blob="802e8dce29925de10a8f4bfd96c4b627d0c0cdfe"),
    "rine_ldm": _entry("ldm", 4, 1024, 10_521_601, git_blob="6b225b2aeae4f52e99a7fb675d8bcb736aea4a2e"),
}
