"""Image towers of open_clip, with the activation, normalization and position embeddings of their weights."""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import open_clip.modified_resnet
import open_clip.timm_model
import open_clip.transformer
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featdistill.command_line import UserError
from featdistill.models import encoders
from featdistill.models.encoders import Backbone, BackboneSpec, Reading
from featdistill.models.timm_encoders import TimmBackbone, group_parameters, patch_px, timm_layers
from featdistill.models.weights import first_line, from_hub

_RESNET_STRIDE_PX = 32


class OpenClipBackbone(Backbone):
    """The image tower of an open_clip model; `projection` is the joint embedding, not normalized."""

    kinds, kind = ("pool", "projection"), "projection"

    def __init__(self, visual: nn.Module, feature_dim: int, input_size: int, mean: tuple, std: tuple) -> None:
        Backbone.__init__(self, feature_dim, input_size, mean, std)
        self.visual = visual

    @property
    def name(self) -> str:
        return type(self.visual).__name__


class OpenClipTransformer(OpenClipBackbone):
    """open_clip's own vision transformer: CLIP and, with attention pooling, CoCa."""

    drops_tokens = is_plain = True
    class_tokens = 1

    @property
    def grid(self) -> int:
        return self.visual.grid_size[0]

    @property
    def depth(self) -> int:
        return len(self.visual.transformer.resblocks)

    def _embed(self, images: Tensor, keep: Tensor | None) -> Tensor:
        # open_clip can only drop tokens at random, and starts at the image, so its forward pass is repeated.
        hidden = self.visual._embeds(images)
        return hidden if keep is None else encoders.keep_tokens(hidden, keep, self.class_tokens)

    def _blocks(self, hidden: Tensor) -> list[Callable[[Tensor], Tensor]]:
        transformer = self.visual.transformer
        if transformer.grad_checkpointing:
            return [partial(checkpoint, block, use_reentrant=False) for block in transformer.resblocks]
        return list(transformer.resblocks)

    def _finish(self, hidden: Tensor, kinds: Collection[str]) -> tuple[dict[str, Tensor], Tensor]:
        visual, pooled = self.visual, {}
        if kinds:
            pooled["pool"], _ = visual._pool(hidden)
            pooled["projection"] = pooled["pool"] if visual.proj is None else pooled["pool"] @ visual.proj
        # With attention pooling, the norm follows it and has the width of the pooled feature.
        normalized = hidden if visual.attn_pool is not None else visual.ln_post(hidden)
        return {kind: pooled[kind] for kind in kinds}, normalized

    def layers(self) -> list[list[str]]:
        stem = r"^(?:conv1|class_embedding|positional_embedding|ln_pre)"
        matcher = {"stem": stem, "blocks": r"^transformer\.resblocks\.(\d+)"}
        return group_parameters(self.visual, matcher, "visual.")

    @property
    def _block_list(self) -> nn.ModuleList:
        return self.visual.transformer.resblocks

    def _set_whole_blocks(self, enabled: bool) -> None:
        self.visual.set_grad_checkpointing(enabled)


class OpenClipResNet(OpenClipBackbone):
    """CLIP's ResNet: the tokens are the map before attention pooling, which also projects."""

    kinds = ("projection",)
    depth = 5  # the stem and four stages

    def _read_maps(self, images: Tensor, layers: Collection[int], kinds: Collection[str]) -> Reading:
        # With the last stage among them, all stages are computed, as the pooling needs.
        numbers = sorted({*layers, self.depth} if kinds else set(layers))
        output = self.visual.forward_intermediates(
            images, indices=[number - 1 for number in numbers], intermediates_only=not kinds
        )
        read = {
            number: encoders.map_layer(encoders.map_to_tokens(values))
            for number, values in zip(numbers, output["image_intermediates"], strict=True)
        }
        return Reading({kind: output["image_features"] for kind in kinds}, read)

    def layers(self) -> list[list[str]]:
        matcher = {"stem": r"^(?:conv|bn)\d", "blocks": r"^layer(\d)\.(\d+)"}
        return group_parameters(self.visual, matcher, "visual.")

    def _set_whole_blocks(self, enabled: bool) -> None:
        # open_clip's own switch silently does nothing here.
        if enabled:
            raise encoders.no_checkpointing(self.visual)


class OpenClipTimm(OpenClipBackbone, TimmBackbone):
    """An open_clip model whose image tower is a timm model followed by a projection."""

    kinds, kind = OpenClipBackbone.kinds, OpenClipBackbone.kind

    @property
    def timm_model(self) -> nn.Module:
        return self.visual.trunk

    def pool(self, features: Tensor, kind: str | None = None) -> Tensor:
        pooled = self.timm_model.forward_head(features)
        return pooled if kind == "pool" else self.visual.head(pooled)

    def layers(self) -> list[list[str]]:
        layers = timm_layers(self.timm_model, "visual.trunk.")
        layers[-1] += [f"visual.head.{name}" for name, _ in self.visual.head.named_parameters()]
        return layers


_TOWERS: dict[type[nn.Module], type[OpenClipBackbone]] = {
    open_clip.transformer.VisionTransformer: OpenClipTransformer,
    open_clip.modified_resnet.ModifiedResNet: OpenClipResNet,
    open_clip.timm_model.TimmModel: OpenClipTimm,
}


def build_open_clip(spec: BackboneSpec, weights: str) -> OpenClipBackbone:
    """Build the image tower of an open_clip model; see `backbones.build`. A local file has both towers."""
    config = open_clip.get_model_config(spec.name)
    tagged = open_clip.get_pretrained_cfg(spec.name, spec.tag) if spec.tag else {}
    vision = config["vision_cfg"]
    default_size = vision.get("image_size", 224)
    size = spec.input_size or default_size
    is_resnet = isinstance(vision.get("layers"), (list, tuple))
    options: dict[str, Any] = {"device": torch.get_default_device()}
    message = f"input size {size} px does not fit open_clip:{spec.name}"
    if size != default_size:
        if "timm_model_name" not in vision:
            encoders.check_multiple(
                message, size, _RESNET_STRIDE_PX if is_resnet else vision.get("patch_size", 16)
            )
        # A ResNet is built at its default size: open_clip does not resize the positions of its pooling.
        options |= {} if is_resnet else {"force_image_size": size}
    # The name of the architecture need not say which activation the weights were trained with.
    options |= {"force_quick_gelu": True} if tagged.get("quick_gelu") else {}
    visual = _create(spec, size, weights, options).visual
    if size != default_size and "timm_model_name" in vision:
        encoders.check_multiple(message, size, patch_px(visual.trunk))
    if is_resnet:
        _resize_attention_pool(visual, size)
    mean, std = tuple(tagged.get("mean") or encoders.CLIP_MEAN), tuple(tagged.get("std") or encoders.CLIP_STD)
    return _TOWERS[type(visual)](visual, config["embed_dim"], size, mean, std)


def _create(spec: BackboneSpec, size: int, weights: str, options: dict[str, Any]) -> nn.Module:
    """Return a whole open_clip model, both towers, with its weights."""
    name = spec.name
    if weights == "hub":
        if not spec.tag:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none; use a file"
            raise UserError(f"open_clip:{name} needs the name of its weights, /TAG; it has: {tags}")
        with _quiet(logging.ERROR):
            return from_hub(name, lambda: open_clip.create_model(name, pretrained=spec.tag, **options))
    path = None if weights == "random" else str(Path(weights).resolve())
    try:
        with _quiet(logging.WARNING):
            return open_clip.create_model(name, pretrained=path, weights_only=True, **options)
    except (AssertionError, RuntimeError) as error:
        what = f"{weights} does not fit" if path else f"input size {size} px does not fit"
        raise UserError(f"{what} open_clip:{name}: {first_line(error)}") from error
    except Exception as error:  # torch and safetensors raise many types for files in other formats
        if not path:
            raise
        raise UserError(f"{weights} is not a readable weights file: {first_line(error)}") from error


@contextmanager
def _quiet(level: int) -> Iterator[None]:
    """Silence open_clip's warnings that weights are random, and errors that our message repeats."""
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
