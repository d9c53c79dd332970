"""Encoders of timm, and the tiny transformers, which are timm models too."""

import re
import sys
from collections.abc import Callable, Collection
from typing import Any

import timm
import timm.models
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featdistill.command_line import UserError
from featdistill.models import encoders, timm_transformers
from featdistill.models.encoders import Backbone, BackboneSpec, Reading
from featdistill.models.tiny import tiny_transformer
from featdistill.models.weights import FILE_WEIGHTS, encoder_only, first_line, from_hub

_HALF = (0.5, 0.5, 0.5)


class TimmBackbone(Backbone):
    """Any timm model; `projection` is the output of its head, if it is built with one.

    Args:
        feature: `projection` if that is what `forward` returns, anything else for the pooled feature.
    """

    def __init__(self, model: nn.Module, feature: str, input_size: int, mean: tuple, std: tuple) -> None:
        projects = feature == "projection"
        feature_dim = model.num_classes if projects else model.head_hidden_size
        super().__init__(feature_dim, input_size, tuple(mean), tuple(std))
        self.model, self.projects = model, projects

    @property
    def timm_model(self) -> nn.Module:
        return self.model

    @property
    def name(self) -> str:
        return type(self.timm_model).__name__

    @property
    def grid(self) -> int | None:
        grid = getattr(getattr(self.timm_model, "patch_embed", None), "grid_size", None)
        # Layers of different resolution merge patches.
        reductions = {layer["reduction"] for layer in getattr(self.timm_model, "feature_info", None) or ()}
        return grid[0] if grid and len(reductions) == 1 else None

    @property
    def drops_tokens(self) -> bool:
        return isinstance(self.timm_model, VisionTransformer)

    @property
    def is_plain(self) -> bool:
        return isinstance(self.timm_model, timm_transformers.PLAIN)

    @property
    def depth(self) -> int:
        return len(self.timm_model.blocks if self.is_plain else self.timm_model.feature_info)

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("pool", "projection") if self.model.num_classes else ("pool",)

    @property
    def kind(self) -> str:
        return "projection" if self.projects else "pool"

    @property
    def class_tokens(self) -> int:
        return self.timm_model.num_prefix_tokens - self.register_tokens if self.is_plain else 0

    @property
    def register_tokens(self) -> int:
        return timm_transformers.register_tokens(self.timm_model) if self.is_plain else 0

    def pool(self, features: Tensor, kind: str | None = None) -> Tensor:
        """Return the pooled feature (B, D), by default that of `forward`, of timm's unpooled features."""
        return self.model.forward_head(features, pre_logits=(kind or self.kind) == "pool")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.timm_model.forward_features(images)
        return self.pool(features), _tokens_of(self.timm_model, features)

    def _embed(self, images: Tensor, keep: Tensor | None) -> Tensor:
        return timm_transformers.embed(self.timm_model, images, keep)

    def _blocks(self, hidden: Tensor) -> list[Callable[[Tensor], Tensor]]:
        return timm_transformers.blocks(self.timm_model, hidden)

    def _finish(self, hidden: Tensor, kinds: Collection[str]) -> tuple[dict[str, Tensor], Tensor]:
        features = self.timm_model.norm(hidden)
        return {kind: self.pool(features, kind) for kind in kinds}, features

    def _read_maps(self, images: Tensor, layers: Collection[int], kinds: Collection[str]) -> Reading:
        model = self.timm_model
        earlier = sorted(set(layers) - {self.depth})
        indices = [number - 1 for number in earlier]
        if not kinds and self.depth not in layers:
            maps = model.forward_intermediates(
                images, indices=indices, stop_early=True, intermediates_only=True
            )
        elif earlier:
            features, maps = model.forward_intermediates(images, indices=indices)
        else:
            features, maps = model.forward_features(images), []
        read = {
            number: encoders.map_layer(encoders.map_to_tokens(values))
            for number, values in zip(earlier, maps, strict=True)
        }
        if self.depth in layers:
            read[self.depth] = encoders.map_layer(_tokens_of(model, features))
        return Reading({kind: self.pool(features, kind) for kind in kinds}, read)

    def layers(self) -> list[list[str]]:
        return timm_layers(self.timm_model, "model.")

    @property
    def _block_list(self) -> nn.ModuleList:
        return self.timm_model.blocks

    def _set_whole_blocks(self, enabled: bool) -> None:
        try:
            self.timm_model.set_grad_checkpointing(enabled)
        except (AssertionError, AttributeError) as error:  # how timm models refuse
            raise encoders.no_checkpointing(self.timm_model) from error


def _tokens_of(model: nn.Module, features: Tensor) -> Tensor:
    """Return the patch tokens (B, N, C) among a timm model's features."""
    if features.ndim == 3:
        return features[:, getattr(model, "num_prefix_tokens", 0) :]
    is_channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return features.flatten(1, 2) if is_channels_last else encoders.map_to_tokens(features)


def timm_layers(model: nn.Module, prefix: str) -> list[list[str]]:
    """Return `Backbone.layers` of a timm model, with a prefix before every name."""
    if hasattr(model, "group_matcher"):
        return group_parameters(model, _without_tail(model.group_matcher(coarse=False)), prefix)
    # A few architectures do not define layers: each part, or stage of a part, counts as one.
    parts: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts.setdefault(re.match(r"\w+(\.\d+)?", name)[0], []).append(prefix + name)
    return [*parts.values(), []]


def group_parameters(module: nn.Module, matcher: Any, prefix: str) -> list[list[str]]:
    """Group a module's parameters by a matcher in timm's format; see `Backbone.layers`."""
    by_depth = timm.models.group_parameters(module, matcher)
    groups = [by_depth[depth] for depth in sorted(by_depth)]
    patterns = [r".*\.\d+\."]
    if isinstance(matcher, dict):
        rules = [[(rule, None)] if isinstance(rule, str) else rule for rule in matcher.values() if rule]
        patterns = [pattern for rule in rules for pattern, _ in rule]
    # Parameters that match no pattern follow the blocks; if the last ones match, nothing does.
    ends_with_block = any(re.match(pattern, groups[-1][0]) for pattern in patterns)
    return [[prefix + name for name in group] for group in [*groups, *([[]] if ends_with_block else [])]]


def _without_tail(matcher: Any) -> Any:
    """Remove the rules that count the final norm as part of the last block."""
    if not isinstance(matcher, dict):
        return matcher
    # (99999,) is timm's mark for "with the previous group"; without a block's number, that is the last block.
    return {
        part: [pair for pair in rule if pair[1] != (99999,) or re.compile(pair[0]).groups]
        if isinstance(rule, list | tuple)
        else rule
        for part, rule in matcher.items()
    }


def patch_px(model: nn.Module) -> int:
    """Return the side of a timm model's patch in px; 1 for a model that does not cut images into patches."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None) or 1
    return patch[0] if isinstance(patch, tuple) else patch


def build_timm(spec: BackboneSpec, weights: str) -> Backbone:
    """Build a timm model; see `backbones.build`."""
    name, file_weights = spec.full_name, FILE_WEIGHTS.get(spec.tag)
    config = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {} if spec.projects else {"num_classes": 0}
    options |= spec.options
    default_size = config.input_size[-1]
    size = spec.input_size or default_size
    if size != default_size:
        options |= {"img_size": size} if config.fixed_input_size else {}
        _check_size(spec, size, options)
    if weights != "hub":
        model = timm.create_model(name, pretrained=False, **options)
    elif file_weights:
        raise UserError(
            f"the weights '{spec.tag}' cannot be downloaded by name: get {file_weights.source} "
            f"(license {file_weights.license}) and pass the file with --weights FILE"
        )
    else:
        model = from_hub(name, lambda: timm.create_model(name, pretrained=True, **options))
    if weights not in ("hub", "random"):
        load_file(model, weights, spec.tag)
    mean, std = (file_weights.mean, file_weights.std) if file_weights else (config.mean, config.std)
    return TimmBackbone(model, spec.feature, size, mean, std)


def _check_size(spec: BackboneSpec, size: int, options: dict[str, Any]) -> None:
    """Raise a `UserError` if a timm model does not accept images of this size."""
    message = f"input size {size} px does not fit timm:{spec.name}"
    try:
        with torch.device("meta"):
            model = timm.create_model(spec.full_name, **options).eval()
            # With other options, the default size does not come from the architecture.
            if spec.options.keys() <= {"act_layer"}:
                encoders.check_multiple(message, size, patch_px(model))
            model.forward_features(torch.empty(1, 3, size, size))
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{message}: {first_line(error)}") from error


def build_tiny(spec: BackboneSpec, weights: str) -> Backbone:
    """Build one of the tiny transformers; see `backbones.build`."""
    if weights == "hub":
        raise UserError(f"tiny_{spec.name} has no published weights; use weights: random or a local file")
    size = spec.input_size or 96
    model = tiny_transformer(spec.name, size, **spec.options)
    if weights != "random":
        load_file(model, weights)
    mean, std = (encoders.CLIP_MEAN, encoders.CLIP_STD) if spec.name != "siglip" else (_HALF, _HALF)
    return TimmBackbone(model, spec.feature, size, mean, std)


def load_file(model: nn.Module, path: str, tag: str = "") -> None:
    """Load a local file strictly into a timm model, without a classifier that the model does not have.

    timm converts files of a model's original authors and resizes position embeddings.

    Args:
        tag: a key of `FILE_WEIGHTS` if the file is expected to be that one.

    Raises:
        UserError: the file is not a weights file, or does not fit the model.
    """
    try:
        state = timm.models.load_state_dict(path, weights_only=True)
    except Exception as error:  # safetensors and torch raise many types for files in other formats
        raise UserError(f"{path} is not a readable weights file: {first_line(error)}") from error
    if tag in FILE_WEIGHTS:
        state = encoder_only(state, FILE_WEIGHTS[tag].encoder)
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(state, model) if convert else state
        names = model.state_dict().keys()
        if "head.weight" in state and isinstance(getattr(model, "head", None), nn.Linear):
            # The projection of CLIP has no bias; timm's has one, which is 0.
            state = {"head.bias": torch.zeros(len(state["head.weight"])), **state}
        state = {key: value for key, value in state.items() if key in names or not key.startswith(classifier)}
        model.load_state_dict(state, strict=True)
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not fit {type(model).__name__}: {reason}") from error
