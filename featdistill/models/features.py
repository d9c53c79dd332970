"""What an expert's head gets from its backbone: pooled features, and tokens of any of its layers.

`PART[+PART...][:LAYERS]`, for example `pool`, `class+mean`, `mean+std:2,3,5` or `layers:6,8,10,12`.

| part | values |
|---|---|
| `pool`, `projection` | the pooled feature, and after the last layer: CLIP's projection, a classifier's |
| `class` | class token |
| `mean` (or `mean_tokens`), `std` | mean and standard deviation over the patch tokens, or over the map |
| `registers` | all register tokens, one after the other (DINOv2 with registers, DINOv3) |
| `layers` | `class` if the backbone has a class token, else `mean` |
| `top_tokens:K` | mean of the K patch tokens of the last layer that tell the classes apart best |

LAYERS is `6,8` or `all`, and the last layer without it; `pool` and `projection` have no layer. Layers are
blocks of a transformer, or stages of a hierarchical network, counted from 1. Tokens of the last layer are
those that stage 2 aligns, after the final norm; earlier ones are not normalized. The values come layer by
layer in the order given, within a layer part by part as written, after those of `pool` and `projection`.

An atom is one array that a backbone gives per image, from which features are combined; `read_atoms` computes
any number of them in one forward pass.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from featdistill.command_line import UserError, nearest
from featdistill.models.encoders import Backbone, Layer, Reading

POOLED = ("pool", "projection")
_ALIASES = {"mean_tokens": "mean"}
_PARTS = (*POOLED, "class", "mean", "std", "registers", "layers", "top_tokens")
KINDS = (*POOLED, "class", "mean", "std", "registers", "tokens", "hidden")
# Keeps the gradient of the standard deviation finite where a channel is constant.
_MIN_VARIANCE = 1e-12

Array = Tensor | np.ndarray


class Atom(NamedTuple):
    """One array that a backbone gives per image.

    | kind | shape |
    |---|---|
    | `pool`, `projection` | (D,); layer 0 |
    | `class`, `mean`, `std` | (C,) |
    | `registers` | (R * C,), one register token after the other |
    | `tokens` | (N, C), the patch tokens |
    | `hidden` | (T, C), all tokens that the next block receives: class, registers, patches; not normalized |
    """

    kind: str
    layer: int = 0

    @property
    def name(self) -> str:
        """A file name: `pool`, `mean-12`, `hidden-10`."""
        return f"{self.kind}-{self.layer}" if self.layer else self.kind


def parse_atom(name: str) -> Atom:
    """Return the atom of a name.

    Raises:
        UserError: the name is not that of an atom.
    """
    kind, separator, layer = name.partition("-")
    is_number = layer.isascii() and layer.isdigit() and int(layer) > 0
    if kind not in KINDS or (kind in POOLED) == bool(separator) or (separator and not is_number):
        raise UserError(f"unknown atom '{name}'; atoms are named like pool, mean-12 or hidden-10")
    return Atom(kind, int(layer) if separator else 0)


class Layout(NamedTuple):
    """What a backbone has.

    Attributes:
        pooled: width of each pooled feature that it can return.
        tokens, widths: number N and width C of the patch tokens of each layer.
        class_tokens, register_tokens: how many there are.
        is_plain: see `Backbone`.
    """

    pooled: dict[str, int]
    tokens: tuple[int, ...]
    widths: tuple[int, ...]
    class_tokens: int
    register_tokens: int
    is_plain: bool

    def shape(self, atom: Atom) -> tuple[int, ...]:
        """Return the shape of an atom of one image."""
        if atom.kind in POOLED:
            return (self.pooled[atom.kind],)
        count, width = self.tokens[atom.layer - 1], self.widths[atom.layer - 1]
        prefix = self.class_tokens + self.register_tokens
        return {
            "registers": (self.register_tokens * width,),
            "tokens": (count, width),
            "hidden": (prefix + count, width),
        }.get(atom.kind, (width,))


class _Reader(nn.Module):
    """`Backbone.read` as a forward pass."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, layers: Collection[int], kinds: Collection[str]) -> Reading:
        return self.backbone.read(images, layers, kinds)


@torch.no_grad()
def layout(backbone: Backbone) -> Layout:
    """Measure a backbone; nothing is computed, since weights and images are replaced by their shapes."""
    reader, size = _Reader(backbone), backbone.input_size
    state = {**dict(reader.named_parameters()), **dict(reader.named_buffers())}
    shapes = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    # Two images: BatchNorm refuses one in training mode if its map is a single pixel.
    images = torch.empty(2, 3, size, size, device="meta", dtype=next(backbone.parameters()).dtype)
    numbers = range(1, backbone.depth + 1)
    with torch.device("meta"):
        reading = functional_call(reader, shapes, (images, numbers, backbone.kinds))
    tokens = [reading.layers[number].tokens for number in numbers]
    return Layout(
        {kind: values.shape[1] for kind, values in reading.pooled.items()},
        tuple(layer.shape[1] for layer in tokens),
        tuple(layer.shape[2] for layer in tokens),
        backbone.class_tokens,
        backbone.register_tokens,
        backbone.is_plain,
    )


@dataclass(frozen=True)
class Feature:
    """A feature of a certain backbone.

    Attributes:
        text: as it was written.
        atoms: what it is combined from, in the order of its values.
        dim: number D of its values.
        top_count: K of `top_tokens`; 0 without that part.
        positions: patch tokens that `top_tokens` averages; empty until they are chosen.
    """

    text: str
    atoms: tuple[Atom, ...]
    dim: int
    top_count: int = 0
    positions: tuple[int, ...] = ()

    @property
    def needs_positions(self) -> bool:
        """Whether the positions of `top_tokens` are still to be chosen."""
        return bool(self.top_count) and not self.positions

    def combine(self, values: Mapping[Atom, Array]) -> Array:
        """Return the feature (B, D) float32 of atoms (B, *shape); of tensors a tensor, of arrays an array."""
        if self.needs_positions:
            raise ValueError(f"the tokens of {self.text} are not chosen yet")
        parts = []
        for atom in self.atoms:
            value = values[atom]
            if atom.kind == "tokens":
                chosen = value[:, list(self.positions)]
                mean = chosen.float().mean(1) if isinstance(chosen, Tensor) else chosen.mean(1, np.float32)
                parts.append(mean)
            else:
                parts.append(value.float() if isinstance(value, Tensor) else value.astype(np.float32))
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim=1) if isinstance(parts[0], Tensor) else np.concatenate(parts, axis=1)


def parse(text: str, backbone: Backbone | Layout, positions: Sequence[int] = ()) -> Feature:
    """Return the feature that a text describes.

    Args:
        backbone: may be on the meta device; only its structure is read.
        positions: chosen patch tokens of `top_tokens`.

    Raises:
        UserError: the text is not a feature, or the backbone lacks a part or layer of it.
    """
    if isinstance(backbone, Backbone) and text == backbone.kind:
        return Feature(text, (Atom(text),), backbone.feature_dim)
    facts = backbone if isinstance(backbone, Layout) else layout(backbone)
    head, separator, tail = text.partition(":")
    parts = [_ALIASES.get(part.strip(), part.strip()) for part in head.split("+")]
    for part in parts:
        if part not in _PARTS:
            known = [*_PARTS, *_ALIASES]
            raise UserError(
                f"feature '{text}': unknown part '{part}'{nearest(part, known)}; parts: {', '.join(known)}"
            )
    parts = [("class" if facts.class_tokens else "mean") if part == "layers" else part for part in parts]
    if len(set(parts)) < len(parts):
        raise UserError(f"feature '{text}' names a part twice")
    for part in parts:
        _check_part(text, part, facts)
    top_count, layers = 0, [len(facts.widths)]
    if "top_tokens" in parts:
        top_count = _top_count(text, tail, facts.tokens[-1])
    elif separator:
        layers = _layers(text, tail, len(facts.widths))
    pooled = [part for part in parts if part in POOLED]
    others = [part for part in parts if part not in POOLED]
    if separator and not others:
        raise UserError(f"feature '{text}': {pooled[0]} has no layers; write {'+'.join(pooled)}")
    kinds = ["tokens" if part == "top_tokens" else part for part in others]
    atoms = [Atom(kind) for kind in pooled] + [Atom(kind, layer) for layer in layers for kind in kinds]
    dim = sum(facts.shape(atom)[-1] for atom in atoms)
    if positions and (
        len(positions) != top_count or not 0 <= min(positions) <= max(positions) < facts.tokens[-1]
    ):
        raise UserError(f"feature '{text}': the positions {list(positions)} of its tokens do not fit it")
    return Feature(text, tuple(atoms), dim, top_count, tuple(positions))


def _check_part(text: str, part: str, facts: Layout) -> None:
    has = {kind: kind in facts.pooled for kind in POOLED}
    has |= {"class": facts.class_tokens > 0, "registers": facts.register_tokens > 0}
    if not has.get(part, True):
        available = [name for name in (*POOLED, "class", "mean", "std", "registers") if has.get(name, True)]
        raise UserError(
            f"feature '{text}': the backbone has no {part}; it has {', '.join(available)}, and "
            f"{len(facts.widths)} layers"
        )


def _layers(text: str, tail: str, depth: int) -> list[int]:
    if tail.strip() == "all":
        return list(range(1, depth + 1))
    numbers = [part.strip() for part in tail.split(",")]
    for number in numbers:
        if not (number.isascii() and number.isdigit() and 1 <= int(number) <= depth):
            raise UserError(
                f"feature '{text}': {number or 'nothing'} is not a layer; the backbone has layers 1 to "
                f"{depth}, written like 6,8 or all"
            )
    if len(set(map(int, numbers))) < len(numbers):
        raise UserError(f"feature '{text}' names a layer twice")
    return [int(number) for number in numbers]


def _top_count(text: str, tail: str, tokens: int) -> int:
    count = tail.strip()
    if not (count.isascii() and count.isdigit() and 1 <= int(count) <= tokens):
        raise UserError(
            f"feature '{text}': write top_tokens:K with the number of patch tokens, from 1 to {tokens}"
        )
    return int(count)


def read_atoms(
    backbone: Backbone, images: Tensor, atoms: Collection[Atom], keep: Tensor | None = None
) -> dict[Atom, Tensor]:
    """Compute atoms (B, *shape), all in one forward pass.

    Args:
        images: (B, 3, S, S) float, normalized.
        keep: see `Backbone.read`.
    """
    layers, kinds = needs(atoms)
    return atoms_of(backbone, backbone.read(images, layers, kinds, keep), atoms)


def needs(atoms: Collection[Atom]) -> tuple[list[int], list[str]]:
    """Return the layers and the pooled features that atoms are read from."""
    return sorted({atom.layer for atom in atoms} - {0}), [atom.kind for atom in atoms if atom.kind in POOLED]


def atoms_of(backbone: Backbone, reading: Reading, atoms: Collection[Atom]) -> dict[Atom, Tensor]:
    """Return atoms of what a forward pass has computed."""
    return {
        atom: reading.pooled[atom.kind]
        if atom.kind in POOLED
        else _READERS[atom.kind](reading.layers[atom.layer], backbone.class_tokens)
        for atom in atoms
    }


def _standard_deviation(layer: Layer, _: int) -> Tensor:
    variance = layer.tokens.float().var(dim=1, correction=0)
    return variance.clamp(min=_MIN_VARIANCE).sqrt()


_READERS = {
    "class": lambda layer, _: layer.prefix[:, 0],
    "mean": lambda layer, _: layer.tokens.float().mean(dim=1),
    "std": _standard_deviation,
    "registers": lambda layer, class_tokens: layer.prefix[:, class_tokens:].flatten(1),
    "tokens": lambda layer, _: layer.tokens,
    "hidden": lambda layer, _: layer.hidden,
}


class FisherSums:
    """How well each patch token tells the classes apart, summed over batches in float64.

    The score of a token is the mean over its channels of Fisher's criterion, (m1 - m0)^2 / (v1 + v0), with
    the means and variances of the two classes.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2, dtype=torch.float64)
        self.sums: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, tokens: Array, labels: Array) -> None:
        """Add tokens (B, N, C) and their labels (B,), 0 or 1."""
        tokens = torch.as_tensor(tokens).detach().cpu().double()
        labels = torch.as_tensor(labels).cpu()
        if self.sums is None:
            self.sums = torch.zeros(2, *tokens.shape[1:], dtype=torch.float64)
            self.squares = torch.zeros_like(self.sums)
        for label in (0, 1):
            own = tokens[labels == label]
            self.counts[label] += len(own)
            self.sums[label] += own.sum(dim=0)
            self.squares[label] += own.square().sum(dim=0)

    def scores(self) -> np.ndarray:
        """Return the score of each token, (N,) float64.

        Raises:
            UserError: a class has no image.
        """
        if self.sums is None or not self.counts.all():
            raise UserError("top_tokens needs readable training images of both classes")
        means = self.sums / self.counts[:, None, None]
        variances = (self.squares / self.counts[:, None, None] - means.square()).clamp(min=0)
        spread = variances.sum(dim=0).clamp(min=_MIN_VARIANCE)
        return ((means[1] - means[0]).square() / spread).mean(dim=1).numpy()


def fisher_scores(tokens: Array, labels: Array) -> np.ndarray:
    """Return the score (N,) of each patch token, from tokens (B, N, C) and labels (B,); see `FisherSums`."""
    sums = FisherSums()
    sums.add(tokens, labels)
    return sums.scores()


def top_positions(scores: np.ndarray, count: int) -> tuple[int, ...]:
    """Return the positions of the `count` highest scores, ascending; of equal ones the first."""
    return tuple(sorted(np.argsort(-scores, kind="stable")[:count].tolist()))
