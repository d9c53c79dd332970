"""Image towers of open_clip, with the activation, the normalisation and the positions that they need."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from featdistill.command_line import UserError
from featdistill.models.encoders import OPEN_CLIP_TOWERS, OpenClipBackbone, OpenClipResNet
from featdistill.models.input_sizes import check_multiple, patch_px
from featdistill.models.weights import first_line, from_hub

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_RESNET_STRIDE_PX = 32


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
