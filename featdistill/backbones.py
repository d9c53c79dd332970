"""The zoo: image encoders by name, each giving a pooled feature and its token map.

Names: a short name of `BACKBONES`, `timm:NAME`, or `open_clip:NAME` (with `/TAG` where hub weights are
wanted). Weights: `hub` (downloaded by the library), `random`, or the path of a local file (safetensors, or a
PyTorch state dict, which is only ever read with `weights_only=True`).
"""

import dataclasses
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import open_clip
import timm
import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from featdistill.command_line import UserError, nearest

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class BackboneSpec:
    """How a backbone is built; plain data, stored with every expert.

    Attributes:
        library: who builds it: timm, open_clip, or this module (`tiny`).
        name: the library's own name of the architecture.
        tag: open_clip's name of the pretrained weights.
        feature: `pool` for the pooled embedding, `projection` for the one projected to the joint space
            (CLIP).
        input_size: side of the input in px; None for the architecture's own.
        options: further arguments of timm's `create_model` that make the architecture another one, such as
            its width or depth.
    """

    library: Literal["timm", "open_clip", "tiny"]
    name: str
    tag: str = ""
    feature: Literal["pool", "projection"] = "pool"
    input_size: int | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


# Paper, section 4.1; the feature each expert takes is that of the authors' inference release.
BACKBONES: dict[str, BackboneSpec] = {
    "clip_l14": BackboneSpec("timm", "vit_large_patch14_clip_quickgelu_224", "openai", "projection"),
    "siglip_so400m": BackboneSpec("timm", "vit_so400m_patch14_siglip_384", "webli"),
    "tiny_clip": BackboneSpec("tiny", "clip", feature="projection"),
    "tiny_siglip": BackboneSpec("tiny", "siglip"),
}


class Backbone(nn.Module):
    """An image encoder.

    Attributes:
        feature_dim: width D of the pooled feature.
        input_size: side S of its square input in px.
        mean, std: normalisation it was trained with, for pixels in [0, 1].
    """

    feature_dim: int
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalised images.

        Args:
            images: (B, 3, S, S) float, normalised by `mean` and `std`.

        Returns:
            Pooled feature (B, D) and the patch tokens of the last layer after the final norm, (B, N, C);
            class and register tokens are left out, and the map of a convolutional network is read as tokens
            row by row.
        """
        raise NotImplementedError

    def intermediates(self, images: Tensor, layers: int) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled feature and the patch tokens of the last `layers` layers, in their order.

        The last is that of `forward`, after the final norm; the earlier ones are as the blocks leave them.
        """
        raise NotImplementedError


class TimmBackbone(Backbone):
    """Any timm model; `pool` takes its pooled feature, `projection` what its pretrained head makes of it."""

    def __init__(self, model: nn.Module, feature: str, input_size: int, mean: tuple, std: tuple) -> None:
        super().__init__()
        self.model = model
        self.projects = feature == "projection"
        self.feature_dim = model.num_classes if self.projects else model.head_hidden_size
        self.input_size, self.mean, self.std = input_size, tuple(mean), tuple(std)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.forward_features(images)
        pooled = self.model.forward_head(features, pre_logits=not self.projects)
        return pooled, self._tokens(features)

    def _tokens(self, features: Tensor) -> Tensor:
        if features.ndim == 3:
            return features[:, getattr(self.model, "num_prefix_tokens", 0) :]
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            return features.flatten(1, 2)
        return features.flatten(2).transpose(1, 2)


class OpenClipBackbone(Backbone):
    """The image tower of any open_clip model; its feature is the projected embedding."""

    def __init__(self, visual: nn.Module, feature_dim: int, input_size: int) -> None:
        super().__init__()
        self.visual = visual
        self.feature_dim, self.input_size = feature_dim, input_size
        self.mean = tuple(getattr(visual, "image_mean", None) or CLIP_MEAN)
        self.std = tuple(getattr(visual, "image_std", None) or CLIP_STD)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.visual.forward_intermediates(images, indices=1, normalize_intermediates=True)
        return output["image_features"], output["image_intermediates"][-1].flatten(2).transpose(1, 2)


def resolve_spec(name: str, input_size: int | None = None) -> BackboneSpec:
    """Return the specification of a backbone by name.

    Raises:
        UserError: neither the zoo nor the library knows the name; the nearest one is named.
    """
    library, separator, rest = name.partition(":")
    if not separator:
        if name not in BACKBONES:
            known = f"{', '.join(BACKBONES)}, timm:NAME, open_clip:NAME"
            raise UserError(f"unknown backbone '{name}'{nearest(name, BACKBONES)}; known: {known}")
        spec = BACKBONES[name]
    elif library == "timm":
        architecture, _, tag = rest.partition(".")
        if not timm.is_model(architecture):
            raise UserError(f"timm has no model '{architecture}'{nearest(architecture, timm.list_models())}")
        spec = BackboneSpec("timm", architecture, tag)
    elif library == "open_clip":
        architecture, _, tag = rest.partition("/")
        if architecture not in open_clip.list_models():
            suggestion = nearest(architecture, open_clip.list_models())
            raise UserError(f"open_clip has no model '{architecture}'{suggestion}")
        spec = BackboneSpec("open_clip", architecture, tag, "projection")
    else:
        raise UserError(f"unknown library '{library}' in backbone '{name}'; known: timm, open_clip")
    return dataclasses.replace(spec, input_size=input_size or spec.input_size)


def build(spec: BackboneSpec, weights: str = "random") -> Backbone:
    """Build a backbone and fill in its weights.

    Args:
        weights: `hub`, `random`, or the path of a local weights file.

    Raises:
        UserError: the weights are not to be had, or do not fit the architecture.
    """
    if weights not in ("hub", "random") and not Path(weights).is_file():
        raise UserError(f"weights file {weights} does not exist (give hub, random, or a file)")
    return {"timm": _build_timm, "open_clip": _build_open_clip, "tiny": _build_tiny}[spec.library](
        spec, weights
    )


def _build_timm(spec: BackboneSpec, weights: str) -> Backbone:
    name = f"{spec.name}.{spec.tag}" if spec.tag and weights == "hub" else spec.name
    with torch.device("meta"):
        plain = timm.create_model(spec.name)
    config = timm.get_pretrained_cfg(f"{spec.name}.{spec.tag}" if spec.tag else spec.name)
    kwargs: dict[str, Any] = {} if spec.feature == "projection" else {"num_classes": 0}
    kwargs |= spec.options
    size = spec.input_size or config.input_size[-1]
    if size != config.input_size[-1] and hasattr(getattr(plain, "patch_embed", None), "img_size"):
        kwargs["img_size"] = size
    if weights == "hub":
        model = _from_hub(name, lambda: timm.create_model(name, pretrained=True, **kwargs))
    else:
        model = timm.create_model(name, pretrained=False, **kwargs)
    if weights not in ("hub", "random"):
        _load_timm_file(model, weights)
    return TimmBackbone(model, spec.feature, size, config.mean, config.std)


def _build_open_clip(spec: BackboneSpec, weights: str) -> Backbone:
    options = {"force_image_size": spec.input_size} if spec.input_size else {}
    if weights == "hub":
        if not spec.tag:
            tags = open_clip.list_pretrained_tags_by_model(spec.name)
            raise UserError(
                f"open_clip:{spec.name} needs the name of its weights, /TAG; it has: {', '.join(tags)}"
            )
        model = _from_hub(
            spec.name, lambda: open_clip.create_model(spec.name, pretrained=spec.tag, **options)
        )
    elif weights == "random":
        # open_clip warns that the weights are random, which is what was asked for.
        logging.disable(logging.WARNING)
        try:
            model = open_clip.create_model(spec.name, pretrained=None, **options)
        finally:
            logging.disable(logging.NOTSET)
    else:
        try:
            model = open_clip.create_model(spec.name, pretrained=weights, weights_only=True, **options)
        except RuntimeError as error:
            raise UserError(f"{weights} does not fit open_clip:{spec.name}: {_first_line(error)}") from error
    size = model.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    feature_dim = open_clip.get_model_config(spec.name)["embed_dim"]
    return OpenClipBackbone(model.visual, feature_dim, size)


def _build_tiny(spec: BackboneSpec, weights: str) -> Backbone:
    """Two small transformers of the paper's two kinds, for the demo and the tests.

    `clip` has a class token and a projection, `siglip` attention pooling and no class token. A convolutional
    stem on the image and its high-pass residual takes the place of the patch embedding, so that they learn
    local traces from random weights, a few thousand images and a minute.
    """
    if weights == "hub":
        raise UserError(f"tiny_{spec.name} has no published weights; use weights: random or a local file")
    size = spec.input_size or 96
    kind = {
        "clip": {"global_pool": "token", "class_token": True, "num_classes": 64},
        "siglip": {"global_pool": "map", "class_token": False, "num_classes": 0},
    }[spec.name]
    model = VisionTransformer(
        img_size=size,
        patch_size=1,
        embed_dim=96,
        depth=2,
        num_heads=3,
        mlp_ratio=2.0,
        embed_layer=partial(HybridEmbed, backbone=_convolutional_stem((24, 48, 64, 96))),
        **kind,
    )
    # The usual 0.02 of large transformers leaves a gradient of next to nothing in one this narrow.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    if weights != "random":
        _load_timm_file(model, weights)
    mean, std = (CLIP_MEAN, CLIP_STD) if spec.name == "clip" else (HALF, HALF)
    return TimmBackbone(model, spec.feature, size, mean, std)


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


def _from_hub(name: str, create: Callable[[], nn.Module]) -> nn.Module:
    try:
        return create()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the weights of {name} could not be had from the hub ({_first_line(error)}); "
            "download them once and give the file with --weights FILE"
        ) from error


def _load_timm_file(model: nn.Module, path: str) -> None:
    """Load a local file strictly; a classifier that this model does not have is left out."""
    try:
        state = timm.models.load_state_dict(path, weights_only=True)
    except Exception as error:  # safetensors and torch raise a zoo of types for a file that is none of theirs
        raise UserError(f"{path} is no readable weights file: {_first_line(error)}") from error
    # A family's own filter turns the spelling of the original authors' files into timm's.
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    state = translate(state, model) if translate else state
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    own = model.state_dict().keys()
    state = {key: value for key, value in state.items() if key in own or not key.startswith(classifier)}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit {type(model).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
