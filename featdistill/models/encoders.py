"""The interface of every image encoder: how it is specified, and what it computes.

`timm_encoders` and `open_clip_encoders` implement it for the models of the two libraries.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featdistill.command_line import UserError
from featdistill.models.weights import FILE_WEIGHTS

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class BackboneSpec:
    """How to build a backbone; plain data, stored with every expert.

    Attributes:
        library: timm, open_clip, or `tiny` for the small transformers of this project.
        name: the library's name of the architecture.
        tag: the library's name of the pretrained weights, or a key of `FILE_WEIGHTS`.
        feature: `pool` for the pooled embedding, `projection` for the one projected to the joint space
            (CLIP).
        input_size: side of the input in px; None for the architecture's default.
        options: further arguments of timm's `create_model` that change the architecture, such as its width
            or depth.
    """

    library: Literal["timm", "open_clip", "tiny"]
    name: str
    tag: str = ""
    feature: Literal["pool", "projection"] = "pool"
    input_size: int | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """timm's name of architecture and weights together."""
        return f"{self.name}.{self.tag}" if self.tag and self.tag not in FILE_WEIGHTS else self.name


class Backbone(nn.Module):
    """An image encoder.

    Attributes:
        feature_dim: width D of the pooled feature.
        input_size: side S of its square input in px.
        mean, std: normalization it was trained with, for pixels in [0, 1].
        grid: patches along a side of the input; None unless each token of the last layer is one patch.
        drops_tokens: whether `intermediates` can leave patch tokens out.
    """

    grid: int | None = None
    drops_tokens: bool = False

    def __init__(self, feature_dim: int, input_size: int, mean: tuple, std: tuple) -> None:
        super().__init__()
        self.feature_dim, self.input_size, self.mean, self.std = feature_dim, input_size, mean, std

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B, 3, S, S) float, normalized by `mean` and `std`.

        Returns:
            Pooled feature (B, D), and the patch tokens of the last layer (B, N, C), without class and
            register tokens. The map of a convolutional network is read as tokens row by row. Tokens are those
            after the final norm, except where the library normalizes only the pooled feature (BEiT, CoCa).
        """
        pooled, tokens = self.intermediates(images, 1)
        return pooled, tokens[-1]

    def intermediates(
        self, images: Tensor, layers: int, keep: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled feature and the patch tokens of the last `layers` layers, in their order.

        The last tokens are those of `forward`; earlier ones are not normalized. A layer is a block of a
        transformer, or a stage of a hierarchical network, whose earlier layers have more and narrower tokens.

        Args:
            keep: positions (B, K) int64 of the patch tokens that the blocks receive, in addition to class and
                register tokens; None for all. Kept tokens have the position embeddings of their patches.

        Raises:
            UserError: the backbone has fewer layers.
            ValueError: `keep` is given to a backbone whose `drops_tokens` is False.
        """
        raise NotImplementedError

    def layers(self) -> list[list[str]]:
        """Return the names of the parameters, one list per layer, each parameter in exactly one.

        The first list is the stem with class token and positions, then come the blocks, and the last is what
        follows them (norm, pooling, projection), which may be empty.
        """
        raise NotImplementedError

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them, or stop doing so.

        Gradients are the same. A BatchNorm inside a block sees each batch twice, so that its running
        statistics move faster.

        Raises:
            UserError: the architecture does not support it.
        """
        raise NotImplementedError


def tokens_at(tokens: Tensor, keep: Tensor) -> Tensor:
    """Return the tokens (B, K, C) at the positions `keep` (B, K) int64, of (B, N, C)."""
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))


def keep_tokens(hidden: Tensor, keep: Tensor, prefix: int) -> Tensor:
    """Return the first `prefix` tokens and those of the patches at `keep`."""
    return torch.cat([hidden[:, :prefix], tokens_at(hidden[:, prefix:], keep)], dim=1)


def map_to_tokens(features: Tensor) -> Tensor:
    """Read a map (B, C, H, W) as tokens (B, H * W, C), row by row."""
    return features.flatten(2).transpose(1, 2)


def check_layers(model: nn.Module, layers: int, available: int) -> None:
    """Raise a `UserError` unless 1 to `available` layers are requested."""
    if not 1 <= layers <= available:
        raise UserError(f"{type(model).__name__} has {available} layers; cannot compare the last {layers}")


def check_multiple(message: str, size_px: int, patch_px: int) -> None:
    """Raise a `UserError` that begins with `message` unless a size is a multiple of the patch, both in px."""
    if size_px % patch_px:
        below = size_px // patch_px * patch_px
        choices = f"{below} or {below + patch_px}" if below else f"{patch_px}"
        raise UserError(f"{message}: not a multiple of the patch of {patch_px} px; use {choices}")


def no_checkpointing(model: nn.Module) -> UserError:
    """Return the error of an architecture without gradient checkpointing."""
    return UserError(
        f"{type(model).__name__} does not support gradient checkpointing; set gradient_checkpointing to false"
    )
