"""What every backbone does alike, and how timm's and open_clip's models are made to do it.

A backbone gives a pooled feature and its patch tokens, knows which of its parameters belong to which layer,
and can compute its activations twice to save memory.
"""

import re
from typing import Any

import timm.models
from torch import Tensor, nn

from featdistill.command_line import UserError
from featdistill.models import token_dropping

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Backbone(nn.Module):
    """An image encoder.

    Attributes:
        feature_dim: width D of the pooled feature.
        input_size: side S of its square input in px.
        mean, std: normalisation it was trained with, for pixels in [0, 1].
        interpolation: how its authors resize images.
    """

    feature_dim: int
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str

    @property
    def grid(self) -> int | None:
        """How many patches a side of the input is cut into that stay apart to the last layer.

        None for networks whose tokens are not those of patches.
        """
        return None

    @property
    def drops_tokens(self) -> bool:
        """Whether `intermediates` can leave patch tokens out."""
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalised images.

        Args:
            images: (B, 3, S, S) float, normalised by `mean` and `std`.

        Returns:
            Pooled feature (B, D) and the patch tokens of the last layer after the final norm, (B, N, C);
            class and register tokens are left out, and the map of a convolutional network is read as tokens
            row by row. Where the library norms only what it has pooled (BEiT, CoCa), there is no norm of the
            tokens, and they are as the last layer leaves them.
        """
        pooled, tokens = self.intermediates(images, 1)
        return pooled, tokens[-1]

    def intermediates(
        self, images: Tensor, layers: int, keep: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled feature and the patch tokens of the last `layers` layers, in their order.

        The last is that of `forward`, after the final norm; the earlier ones are as the layers leave them. A
        layer is a block of a transformer. Of a hierarchical network it is a stage, so that earlier layers
        have more and narrower tokens.

        Args:
            images: see `forward`.
            keep: the places (B, K) int64 of the patch tokens that the blocks get, beside class and register
                tokens; None for all. Each has the position of its place. K tokens come back.

        Raises:
            UserError: the backbone has fewer layers.
            ValueError: tokens are to be left out where `drops_tokens` says that they cannot.
        """
        raise NotImplementedError

    def layers(self) -> list[list[str]]:
        """Return the names of the backbone's parameters, a list a layer, from the stem to the projection.

        Every parameter is in exactly one list. The first holds the stem, with class token and positions; then
        comes a list a block. The last list is what lies behind the blocks: norm, pooling, projection. It is
        empty where nothing does.
        """
        raise NotImplementedError

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Compute the blocks' activations twice instead of keeping them, or stop doing so.

        Gradients are the same. A BatchNorm inside a block sees each batch twice, so that its running
        statistics move faster.

        Raises:
            UserError: the architecture cannot.
        """
        raise NotImplementedError


class TimmBackbone(Backbone):
    """Any timm model; `pool` takes its pooled feature, `projection` what its pretrained head makes of it."""

    def __init__(
        self,
        model: nn.Module,
        feature: str,
        input_size: int,
        mean: tuple,
        std: tuple,
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        self.model = model
        self.projects = feature == "projection"
        self.feature_dim = model.num_classes if self.projects else model.head_hidden_size
        self.input_size, self.mean, self.std = input_size, tuple(mean), tuple(std)
        self.interpolation = interpolation

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.forward_features(images)
        pooled = self.model.forward_head(features, pre_logits=not self.projects)
        return pooled, _tokens_of(self.model, features)

    @property
    def grid(self) -> int | None:
        return token_dropping.timm_grid(self.model)

    @property
    def drops_tokens(self) -> bool:
        return token_dropping.timm_can(self.model)

    def intermediates(
        self, images: Tensor, layers: int, keep: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        features, tokens = timm_intermediates(self.model, images, layers, keep)
        return self.model.forward_head(features, pre_logits=not self.projects), tokens

    def layers(self) -> list[list[str]]:
        return with_prefix("model", timm_groups(self.model))

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        checkpoint_timm(self.model, enabled)


def timm_intermediates(
    model: nn.Module, images: Tensor, layers: int, keep: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the features of timm's `forward_features` and the tokens of the last layers."""
    check_layers(model, layers, len(model.feature_info))
    if keep is not None:
        features, tokens = token_dropping.timm_intermediates(model, images, layers, keep)
        return features, [*tokens[:-1], _tokens_of(model, features)]
    features, maps = model.forward_intermediates(images, indices=layers)
    return features, [map_to_tokens(tokens) for tokens in maps[:-1]] + [_tokens_of(model, features)]


def check_layers(model: nn.Module, layers: int, there: int) -> None:
    if not 1 <= layers <= there:
        raise UserError(f"{type(model).__name__} has {there} layers; {layers} of them cannot be compared")


def _tokens_of(model: nn.Module, features: Tensor) -> Tensor:
    """Return the patch tokens (B, N, C) among a timm model's features."""
    if features.ndim == 3:
        return features[:, getattr(model, "num_prefix_tokens", 0) :]
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        return features.flatten(1, 2)
    return map_to_tokens(features)


def map_to_tokens(features: Tensor) -> Tensor:
    """Read a map (B, C, H, W) as tokens (B, H * W, C), row by row."""
    return features.flatten(2).transpose(1, 2)


def parameter_groups(module: nn.Module, matcher: Any) -> list[list[str]]:
    """Group a module's parameters by a matcher of timm's form; last comes what lies behind the blocks."""
    found = timm.models.group_parameters(module, matcher)
    groups = [found[depth] for depth in sorted(found)]
    # What matches no pattern lies behind; where everything matches, nothing does.
    patterns = _patterns(matcher) if isinstance(matcher, dict) else [r".*\.\d+\."]
    return [*groups, []] if any(re.match(pattern, groups[-1][0]) for pattern in patterns) else groups


def _patterns(matcher: dict[str, Any]) -> list[str]:
    rules = [[(rule, None)] if isinstance(rule, str) else rule for rule in matcher.values() if rule]
    return [pattern for rule in rules for pattern, _ in rule]


def timm_groups(model: nn.Module) -> list[list[str]]:
    if hasattr(model, "group_matcher"):
        return parameter_groups(model, _without_tail(model.group_matcher(coarse=False)))
    # A few architectures do not say what their layers are: each part, or stage of a part, counts as one.
    parts: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts.setdefault(re.match(r"\w+(\.\d+)?", name)[0], []).append(name)
    return [*parts.values(), []]


def _without_tail(matcher: Any) -> Any:
    """Take from a matcher what puts the final norm into the last block, so that it is behind the blocks."""
    if not isinstance(matcher, dict):
        return matcher
    # (99999,) is timm's mark for "with the group before"; without a block's number that is the last block.
    return {
        part: [pair for pair in rule if pair[1] != (99999,) or re.compile(pair[0]).groups]
        if isinstance(rule, list | tuple)
        else rule
        for part, rule in matcher.items()
    }


def with_prefix(prefix: str, groups: list[list[str]]) -> list[list[str]]:
    return [[f"{prefix}.{name}" for name in group] for group in groups]


def checkpoint_timm(model: nn.Module, enabled: bool) -> None:
    try:
        model.set_grad_checkpointing(enabled)
    except (AssertionError, AttributeError) as error:  # timm's ways of saying that it cannot
        raise no_checkpointing(model) from error


def no_checkpointing(model: nn.Module) -> UserError:
    return UserError(
        f"{type(model).__name__} has no gradient checkpointing; leave gradient_checkpointing off"
    )


def patch_px(model: nn.Module) -> int:
    """Return the side of a timm model's patch in px; 1 for a model that does not cut images into patches."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None) or 1
    return patch[0] if isinstance(patch, tuple) else patch


def check_multiple(what: str, size_px: int, patch: int) -> None:
    """Raise a `UserError` that begins with `what` where a size is no multiple of the patch, both in px."""
    if size_px % patch:
        below = size_px // patch * patch
        choices = f"{below} or {below + patch}" if below else f"{patch}"
        raise UserError(f"{what}: it is no multiple of the patch of {patch} px; give {choices}")
