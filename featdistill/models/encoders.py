"""The interface of every image encoder: how it is specified, and what it computes.

`timm_encoders` and `open_clip_encoders` implement it for the models of the two libraries.
"""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from featdistill.command_line import UserError
from featdistill.models.checkpointing import set_selective
from featdistill.models.weights import FILE_WEIGHTS

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class BackboneSpec:
    """How to build a backbone; plain data, stored with every expert.

    Attributes:
        library: timm, open_clip, or `tiny` for the small transformers of this project; of a graph, whose
            backbone cannot be built, the runtime.
        name: the library's name of the architecture.
        tag: the library's name of the pretrained weights, or a key of `FILE_WEIGHTS`.
        feature: what the head gets, see `features`; `pool` is the pooled embedding, `projection` the one
            projected to the joint space (CLIP).
        positions: patch tokens, row by row, that the part `top_tokens` of the feature averages.
        input_size: side of the input in px; None for the architecture's default.
        options: further arguments of timm's `create_model` that change the architecture, such as its width
            or depth.
    """

    library: Literal["timm", "open_clip", "tiny", "onnxruntime", "openvino"]
    name: str
    tag: str = ""
    feature: str = "pool"
    input_size: int | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    positions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # A card holds a list.
        object.__setattr__(self, "positions", tuple(self.positions))

    @property
    def projects(self) -> bool:
        """Whether the backbone needs its projection."""
        return "projection" in map(str.strip, self.feature.partition(":")[0].split("+"))

    def describe(self) -> dict[str, Any]:
        """Return the specification as JSON values; without positions, as in older cards."""
        values = dataclasses.asdict(self)
        if not self.positions:
            del values["positions"]
        return values

    @property
    def full_name(self) -> str:
        """timm's name of architecture and weights together."""
        return f"{self.name}.{self.tag}" if self.tag and self.tag not in FILE_WEIGHTS else self.name


class Layer(NamedTuple):
    """The tokens of one layer.

    Attributes:
        tokens: (B, N, C) of the patches. Those of the last layer are after the final norm, as `Backbone`
            returns them; earlier ones are not normalized.
        prefix: (B, P, C), class and register tokens, normalized like `tokens`; P is 0 without any.
        hidden: (B, P + N, C), all tokens as the next block receives them; None unless the backbone is a
            plain transformer.
    """

    tokens: Tensor
    prefix: Tensor
    hidden: Tensor | None


class Reading(NamedTuple):
    """What one forward pass has computed: pooled features (B, D) by kind, and layers by number."""

    pooled: dict[str, Tensor]
    layers: dict[int, Layer]


class Backbone(nn.Module):
    """An image encoder.

    Attributes:
        feature_dim: width D of the pooled feature that `forward` returns.
        input_size: side S of its square input in px.
        mean, std: normalization it was trained with, for pixels in [0, 1].
        grid: patches along a side of the input; None unless each token of the last layer is one patch.
        drops_tokens: whether `read` can leave patch tokens out.
        depth: number of layers: blocks of a transformer, or stages of a hierarchical network.
        kinds: the pooled features it has, out of `pool` and `projection`.
        kind: the pooled feature that `forward` returns.
        class_tokens, register_tokens: how many it has; class tokens come first, register tokens next.
        is_plain: whether it is a transformer whose blocks all have the same tokens, so that `resume` works.
    """

    grid: int | None = None
    drops_tokens: bool = False
    depth: int = 0
    kinds: tuple[str, ...] = ("pool",)
    kind: str = "pool"
    class_tokens: int = 0
    register_tokens: int = 0
    is_plain: bool = False

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
            keep: see `read`.

        Raises:
            UserError: the backbone has fewer layers.
            ValueError: `keep` is given to a backbone whose `drops_tokens` is False.
        """
        numbers = self.last_layers(layers)
        reading = self.read(images, numbers, (self.kind,), keep)
        return reading.pooled[self.kind], [reading.layers[number].tokens for number in numbers]

    def last_layers(self, count: int) -> list[int]:
        """Return the numbers of the last `count` layers, or raise a `UserError` if there are not so many."""
        if not 1 <= count <= self.depth:
            raise UserError(f"{self.name} has {self.depth} layers; cannot compare the last {count}")
        return list(range(self.depth - count + 1, self.depth + 1))

    @property
    def name(self) -> str:
        """The library's name of the model's class."""
        raise NotImplementedError

    def read(
        self, images: Tensor, layers: Collection[int], kinds: Collection[str] = (), keep: Tensor | None = None
    ) -> Reading:
        """Return tokens of any layers and pooled features, all from one forward pass.

        Layers after the last one that is needed are not computed.

        Args:
            images: (B, 3, S, S) float, normalized.
            layers: numbers, from 1 to `depth`.
            kinds: pooled features, out of `self.kinds`.
            keep: positions (B, K) int64 of the patch tokens that the blocks receive, in addition to class and
                register tokens; None for all. Kept tokens have the position embeddings of their patches.

        Raises:
            ValueError: `keep` is given to a backbone whose `drops_tokens` is False.
        """
        if keep is not None and not self.drops_tokens:
            raise ValueError(f"{self.name} cannot leave tokens out")
        if self.is_plain:
            return self._run(self._embed(images, keep), 0, layers, kinds)
        return self._read_maps(images, layers, kinds)

    def resume(
        self,
        hidden: Tensor,
        after: int,
        layers: Collection[int],
        kinds: Collection[str] = (),
        keep: Tensor | None = None,
    ) -> Reading:
        """Return what `read` returns, computed from the tokens between two blocks of a plain transformer.

        Args:
            hidden: (B, P + N, C), `Layer.hidden` of layer `after`.
            after: number of the layer that `hidden` comes from; `layers` come after it.
            keep: see `read`; other tokens are dropped here.
        """
        if keep is not None:
            hidden = keep_tokens(hidden, keep, self.class_tokens + self.register_tokens)
        return self._run(hidden, after, layers, kinds)

    def _run(self, hidden: Tensor, after: int, layers: Collection[int], kinds: Collection[str]) -> Reading:
        """Run the blocks of a plain transformer from the tokens (B, P + N, C) after layer `after`."""
        found = {after: hidden} if after in layers else {}
        end = self.depth if kinds else max(layers)
        for number, block in enumerate(self._blocks(hidden)[after:end], after + 1):
            hidden = block(hidden)
            if number in layers:
                found[number] = hidden
        prefix = self.class_tokens + self.register_tokens
        read = {number: Layer(value[:, prefix:], value[:, :prefix], value) for number, value in found.items()}
        if end < self.depth:
            return Reading({}, read)
        pooled, normalized = self._finish(hidden, kinds)
        if self.depth in layers:
            read[self.depth] = Layer(normalized[:, prefix:], normalized[:, :prefix], hidden)
        return Reading(pooled, read)

    def _embed(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """Return the tokens (B, P + N, C) that the first block of a plain transformer receives."""
        raise NotImplementedError

    def _blocks(self, hidden: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """Return the blocks of a plain transformer as functions of its tokens, which are like `hidden`."""
        raise NotImplementedError

    def _finish(self, hidden: Tensor, kinds: Collection[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the pooled features and all tokens after the final norm, from those after the last block."""
        raise NotImplementedError

    def _read_maps(self, images: Tensor, layers: Collection[int], kinds: Collection[str]) -> Reading:
        """Do `read` for a backbone that is not a plain transformer."""
        raise NotImplementedError

    def layers(self) -> list[list[str]]:
        """Return the names of the parameters, one list per layer, each parameter in exactly one.

        The first list is the stem with class token and positions, then come the blocks, and the last is what
        follows them (norm, pooling, projection), which may be empty.
        """
        raise NotImplementedError

    def set_gradient_checkpointing(self, enabled: bool, selective: bool = False) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them, or stop doing so.

        Gradients are the same. A BatchNorm inside a block sees each batch twice, so that its running
        statistics move faster.

        Args:
            selective: keep the results of matrix products and attention; see `models.checkpointing`.

        Raises:
            UserError: the architecture does not support it.
        """
        if selective and not self.is_plain:
            raise UserError(
                f"{self.name} is not a plain transformer, which selective checkpointing needs; use "
                "checkpointing blocks"
            )
        if self.is_plain:
            set_selective(self._block_list, enabled and selective)
        self._set_whole_blocks(enabled and not selective)

    @property
    def _block_list(self) -> nn.ModuleList:
        """The blocks of a plain transformer."""
        raise NotImplementedError

    def _set_whole_blocks(self, enabled: bool) -> None:
        """Recompute whole blocks, as the library does it."""
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


def map_layer(tokens: Tensor) -> Layer:
    """Return the layer of a network without class token and register tokens."""
    return Layer(tokens, tokens[:, :0], None)


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
