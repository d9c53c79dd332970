"""Image towers of open_clip, with the activation, the normalisation and the positions that they need."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import open_clip.modified_resnet
import open_clip.timm_model
import open_clip.transformer
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from featdistill.command_line import UserError
from featdistill.models import token_dropping
from featdistill.models.encoders import (
    CLIP_MEAN,
    CLIP_STD,
    Backbone,
    check_layers,
    check_multiple,
    checkpoint_timm,
    map_to_tokens,
    no_checkpointing,
    parameter_groups,
    patch_px,
    timm_groups,
    timm_intermediates,
    with_prefix,
)
from featdistill.models.weights import first_line, from_hub

_RESNET_STRIDE_PX = 32


class OpenClipBackbone(Backbone):
    """The image tower of an open_clip model; its feature is the projected embedding, not normalised."""

    def __init__(
        self,
        visual: nn.Module,
        feature_dim: int,
        input_size: int,
        mean: tuple,
        std: tuple,
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        self.visual = visual
        self.feature_dim, self.input_size, self.mean, self.std = feature_dim, input_size, mean, std
        self.interpolation = interpolation


class OpenClipTransformer(OpenClipBackbone):
    """open_clip's own vision transformer: CLIP and, with attention pooling, CoCa."""

    @property
    def grid(self) -> int | None:
        return self.visual.grid_size[0]

    @property
    def drops_tokens(self) -> bool:
        return True

    def intermediates(
        self, images: Tensor, layers: int, keep: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        visual = self.visual
        check_layers(visual, layers, len(visual.transformer.resblocks))
        if keep is None:
            output = visual.forward_intermediates(images, indices=layers, output_fmt="NLC")
            pooled, tokens = output["image_features"], output["image_intermediates"]
        else:
            pooled, tokens = token_dropping.open_clip_intermediates(visual, images, layers, keep)
        # With attention pooling the norm comes behind it, and has the width of what was pooled.
        if visual.attn_pool is None:
            tokens[-1] = visual.ln_post(tokens[-1])
        return pooled, tokens

    def layers(self) -> list[list[str]]:
        stem = r"^(?:conv1|class_embedding|positional_embedding|ln_pre)"
        matcher = {"stem": stem, "blocks": r"^transformer\.resblocks\.(\d+)"}
        return with_prefix("visual", parameter_groups(self.visual, matcher))

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.visual.set_grad_checkpointing(enabled)


class OpenClipResNet(OpenClipBackbone):
    """CLIP's ResNet: the tokens are the map before attention pooling, the feature what the pooling gives."""

    def intermediates(
        self, images: Tensor, layers: int, keep: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        check_layers(self.visual, layers, 5)  # the stem and four stages
        if keep is not None:
            raise ValueError("a convolutional network cannot leave tokens out")
        output = self.visual.forward_intermediates(images, indices=layers)
        return output["image_features"], [map_to_tokens(tokens) for tokens in output["image_intermediates"]]

    def layers(self) -> list[list[str]]:
        matcher = {"stem": r"^(?:conv|bn)\d", "blocks": r"^layer(\d)\.(\d+)"}
        return with_prefix("visual", parameter_groups(self.visual, matcher))

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        # open_clip's own switch does nothing here, without a word.
        if enabled:
            raise no_checkpointing(self.visual)


class OpenClipTimm(OpenClipBackbone):
    """An open_clip model whose image tower is a timm model with a projection behind it."""

    @property
    def grid(self) -> int | None:
        return token_dropping.timm_grid(self.visual.trunk)

    @property
    def drops_tokens(self) -> bool:
        return token_dropping.timm_can(self.visual.trunk)

    def intermediates(
        self, images: Tensor, layers: int, keep: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        features, tokens = timm_intermediates(self.visual.trunk, images, layers, keep)
        return self.visual.head(self.visual.trunk.forward_head(features)), tokens

    def layers(self) -> list[list[str]]:
        layers = with_prefix("visual.trunk", timm_groups(self.visual.trunk))
        layers[-1] += [f"visual.head.{name}" for name, _ in self.visual.head.named_parameters()]
        return layers

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        checkpoint_timm(self.visual.trunk, enabled)


OPEN_CLIP_TOWERS: dict[type[nn.Module], type[OpenClipBackbone]] = {
    open_clip.transformer.VisionTransformer: OpenClipTransformer,
    open_clip.modified_resnet.ModifiedResNet: OpenClipResNet,
    open_clip.timm_model.TimmModel: OpenClipTimm,
}


def build_open_clip(name: str, tag: str, input_size: int | None, weights: str) -> OpenClipBackbone:
    """Build the image tower of an open_clip model.

    Args:
        name: open_clip's name of the architecture.
        tag: its name of the weights, or nothing; normalisation and activation are those of the tag.
        input_size: side of the input in px; None for the architecture's own.
        weights: `hub`, `random`, or the path of a local file of the whole model.

    Raises:
        UserError: weights or input size do not fit, or the weights are not to be had.
    """
    config = open_clip.get_model_config(name)
    tagged = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    vision = config["vision_cfg"]
    own_size = vision.get("image_size", 224)
    size = input_size or own_size
    is_resnet = isinstance(vision.get("layers"), (list, tuple))
    options: dict[str, Any] = {"device": torch.get_default_device()}
    what = f"input size {size} px does not fit open_clip:{name}"
    if size != own_size:
        if "timm_model_name" not in vision:
            check_multiple(what, size, _RESNET_STRIDE_PX if is_resnet else vision.get("patch_size", 16))
        # A ResNet is built at its own size, since open_clip does not resize the positions of its pooling.
        options |= {} if is_resnet else {"force_image_size": size}
    # Which activation belongs to the weights is a fact of the tag that the architecture's name may lack.
    options |= {"force_quick_gelu": True} if tagged.get("quick_gelu") else {}
    visual = _create(name, tag, size, weights, options).visual
    if size != own_size and "timm_model_name" in vision:
        check_multiple(what, size, patch_px(visual.trunk))
    backbone_class = OPEN_CLIP_TOWERS[type(visual)]
    if backbone_class is OpenClipResNet:
        _resize_attention_pool(visual, size)
    return backbone_class(
        visual,
        config["embed_dim"],
        size,
        tuple(tagged.get("mean") or CLIP_MEAN),
        tuple(tagged.get("std") or CLIP_STD),
        tagged.get("interpolation") or "bicubic",
    )


def _create(name: str, tag: str, size: int, weights: str, options: dict[str, Any]) -> nn.Module:
    """Return a whole open_clip model, both towers, with its weights."""
    if weights == "hub":
        if not tag:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none; give a file"
            raise UserError(f"open_clip:{name} needs the name of its weights, /TAG; it has: {tags}")
        with _quiet(logging.ERROR):
            return from_hub(name, lambda: open_clip.create_model(name, pretrained=tag, **options))
    path = None if weights == "random" else str(Path(weights).resolve())
    try:
        with _quiet(logging.WARNING):
            return open_clip.create_model(name, pretrained=path, weights_only=True, **options)
    except (AssertionError, RuntimeError) as error:
        what = f"{weights} does not fit" if path else f"input size {size} px does not fit"
        raise UserError(f"{what} open_clip:{name}: {first_line(error)}") from error
    except Exception as error:  # torch and safetensors raise a zoo of types for a file that is none of theirs
        if not path:
            raise
        raise UserError(f"{weights} is no readable weights file: {first_line(error)}") from error


@contextmanager
def _quiet(level: int) -> Iterator[None]:
    """Keep open_clip from logging that weights are random, as was asked for, or what the error says again."""
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _resize_attention_pool(visual: nn.Module, size: int) -> None:
    """Fit the positions of a CLIP ResNet's pooling to images of another size."""
    old, new = visual.image_size // _RESNET_STRIDE_PX, size // _RESNET_STRIDE_PX
    if new != old:
        with torch.no_grad():
            table = visual.attnpool.positional_embedding[None]
            table = resample_abs_pos_embed(table, [new, new], [old, old], num_prefix_tokens=1)
        visual.attnpool.positional_embedding = nn.Parameter(table[0])
        visual.image_size = size
