"""An expert: backbone, head and preprocessing in one module that can be saved and loaded.

The head is that of the paper's release: D -> 256, ReLU, dropout, -> one logit. (The release has two outputs;
their softmax equals the sigmoid of their difference.)
"""

import dataclasses
import importlib.metadata
import os
import re
import shutil
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from featdistill import __version__, atomic
from featdistill.command_line import UserError
from featdistill.data.preprocessing import Preprocessing, parse_sizes
from featdistill.models import features
from featdistill.models.backbones import build, resolve_spec, with_any_size
from featdistill.models.encoders import Backbone, BackboneSpec, Reading
from featdistill.models.features import Atom
from featdistill.models.weights import Undrawn
from featdistill.records.provenance import read_record

WEIGHTS_FILE, CARD_FILE = "expert.safetensors", "expert.json"
_FORMAT = 1
# Arguments of timm's `create_model` that name files or downloads, and what names of architectures consist of.
_NOT_ARCHITECTURE = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_NAME = re.compile(r"[\w.+-]*")


class Encoded(NamedTuple):
    """The output of an expert: logits (B,) float32, features (B, D), and tokens of the last layers."""

    logit: Tensor
    feature: Tensor
    tokens: tuple[Tensor, ...]


class Expert(nn.Module):
    """Images in, one logit per image out; P(AI-generated) is its sigmoid.

    Attributes:
        feature: what the head gets from the backbone, as `spec` says.
        feature_dim: number D of its values.
        tokens_after: the layer that tokens given instead of images come from.

    Args:
        backbone: the image encoder.
        spec: how to build the backbone, so that loading an expert does not need the pretrained weights.
        head_hidden: width of the head's hidden layer; 0 for a linear head.
        head_dropout: dropout before the last layer.
        resize, max_side_px, sizes: see `Preprocessing`.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: BackboneSpec,
        head_hidden: int = 256,
        head_dropout: float = 0.3,
        resize: str = "shorter",
        max_side_px: int | None = None,
        sizes: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.spec = dataclasses.replace(spec, input_size=backbone.input_size)
        self.feature = features.parse(spec.feature, backbone, spec.positions)
        self.feature_dim = self.feature.dim
        self.tokens_after = 0
        self.head_config = {"hidden": head_hidden, "dropout": head_dropout}
        size = sizes[0] if sizes else backbone.input_size
        self.preprocessing = Preprocessing(
            size, resize, backbone.mean, backbone.std, max_side_px, tuple(sizes)
        )
        if self.feature.top_count:
            self.preprocessing.require_one_size("feature top_tokens")
        if head_hidden:
            layers = [nn.Linear(self.feature_dim, head_hidden), nn.ReLU()]
            self.head = nn.Sequential(*layers, nn.Dropout(head_dropout), nn.Linear(head_hidden, 1))
        else:
            self.head = nn.Sequential(nn.Dropout(head_dropout), nn.Linear(self.feature_dim, 1))
        for name, values in (("mean", backbone.mean), ("std", backbone.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        # Depthwise convolutions are several times faster in this layout; for transformers it is the same.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return logits (B,) float32; see `encode`."""
        return self.encode(images, 0, keep).logit

    def encode(self, images: Tensor, layers: int = 1, keep: Tensor | None = None) -> Encoded:
        """Return logits, features and tokens.

        Args:
            images: (B, 3, S, S), uint8 or float in [0, 1]; or (B, T, C), all tokens that a plain transformer
                has between two of its blocks, after layer `tokens_after`.
            layers: number of last layers whose tokens are returned.
            keep: positions of the patch tokens to compute; see `Backbone.read`.
        """
        return self.encode_with(images, (), layers, keep)[0]

    def encode_with(
        self, images: Tensor, atoms: Collection[Atom], layers: int = 0, keep: Tensor | None = None
    ) -> tuple[Encoded, dict[Atom, Tensor]]:
        """Return what `encode` does, and further atoms (B, *shape), from one forward pass."""
        backbone, is_default = self.backbone, self.spec.feature == self.backbone.kind
        values: dict[Atom, Tensor] = {}
        if images.ndim == 4 and is_default and layers <= 1 and keep is None and not atoms:
            feature, *tokens = backbone(self.normalized(images))
        else:
            wanted = [*self.feature.atoms, *atoms]
            numbers, kinds = features.needs(wanted)
            last = backbone.last_layers(layers) if layers else []
            reading = self.read(images, {*numbers, *last}, kinds, keep)
            values = features.atoms_of(backbone, reading, wanted)
            feature = values[self.feature.atoms[0]] if is_default else self.feature.combine(values)
            tokens = [reading.layers[number].tokens for number in last]
        logit = self.head(feature.to(self.head[-1].weight.dtype))[:, 0]
        return Encoded(logit.float(), feature, tuple(tokens)), values

    def read(
        self, images: Tensor, layers: Collection[int], kinds: Collection[str] = (), keep: Tensor | None = None
    ) -> Reading:
        """Return `Backbone.read` of images, or `Backbone.resume` of tokens; see `encode`."""
        if images.ndim == 4:
            return self.backbone.read(self.normalized(images), layers, kinds, keep)
        hidden = images.to(next(self.backbone.parameters()).dtype)
        return self.backbone.resume(hidden, self.tokens_after, layers, kinds, keep)

    def choose_tokens(self, positions: Sequence[int]) -> None:
        """Set the patch tokens that the part `top_tokens` of the feature averages."""
        self.spec = dataclasses.replace(self.spec, positions=tuple(positions))
        self.feature = features.parse(self.spec.feature, self.backbone, positions)

    def normalized(self, images: Tensor) -> Tensor:
        """Return what the backbone receives, of images (B, 3, S, S), uint8 or float in [0, 1]."""
        images = images / 255 if images.dtype == torch.uint8 else images
        images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        # Normalized in float32, so that only the result is rounded to the type of the weights.
        return images.to(next(self.backbone.parameters()).dtype)


def create_expert(
    backbone: str,
    weights: str,
    *,
    feature: str | None = None,
    input_size: int | None = None,
    input_sizes: str | None = None,
    resize: str = "shorter",
    head_hidden: int = 256,
    head_dropout: float = 0.3,
) -> Expert:
    """Build a new expert: pretrained or random backbone, fresh head (from torch's current random state).

    Args:
        input_sizes: see `preprocessing.parse_sizes`.
    """
    spec, sizes = resolve_spec(backbone, input_size, feature), parse_sizes(input_sizes)
    spec = with_any_size(spec, sizes) if sizes else spec
    return Expert(build(spec, weights), spec, head_hidden, head_dropout, resize, sizes=sizes)


def save_expert(expert: Expert, folder: str | Path, card: dict[str, Any] | None = None) -> None:
    """Write `expert.safetensors` and `expert.json` as one folder, atomically.

    Args:
        card: further entries of `expert.json`: training data, recipe, metrics.
    """
    with atomic.replace_folder(folder) as temporary:
        state = {key: value.detach().cpu().contiguous() for key, value in expert.state_dict().items()}
        safetensors.torch.save_file(state, temporary / WEIGHTS_FILE)
        content = {
            "format": _FORMAT,
            "backbone": expert.spec.describe(),
            "head": expert.head_config,
            "preprocessing": expert.preprocessing.describe(),
            **(card or {}),
            "versions": versions(),
            "weights_sha256": atomic.sha256_of(temporary / WEIGHTS_FILE),
        }
        atomic.write_json(temporary / CARD_FILE, content)
        # safetensors ignores the umask and writes files that only their owner can read.
        shutil.copymode(temporary / CARD_FILE, temporary / WEIGHTS_FILE)


def copy_expert(folder: str | Path, copy: str | Path) -> None:
    """Write an expert a second time, atomically: the weights are stored once where the file system can."""
    with atomic.replace_folder(copy) as temporary:
        shutil.copy(Path(folder, CARD_FILE), temporary)
        weights = Path(folder, WEIGHTS_FILE)
        try:
            os.link(weights, temporary / WEIGHTS_FILE)
        except OSError:
            shutil.copy(weights, temporary)


def load_expert(folder: str | Path, *, draws: bool = False) -> Expert:
    """Load an expert in evaluation mode, on the CPU, in float32.

    Args:
        draws: change torch's random state as `create_expert` does, for what a run draws after it.

    Raises:
        UserError: a file is missing or damaged, or the weights do not fit the description.
    """
    folder = Path(folder)
    card = read_card(folder)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise UserError(f"expert {folder} has no {WEIGHTS_FILE}")
    if atomic.sha256_of(weights) != card.get("weights_sha256"):
        raise UserError(f"{weights} is not the file that {CARD_FILE} describes (its SHA-256 differs)")
    try:
        spec = BackboneSpec(**card["backbone"])
        # A card may come from anyone; it must not make the libraries load anything else.
        if not _NAME.fullmatch(f"{spec.name}{spec.tag}") or spec.options.keys() & _NOT_ARCHITECTURE:
            raise UserError(f"expert {folder}: the backbone in its {CARD_FILE} is not just an architecture")
        head, fitted = card["head"], card["preprocessing"]
        limit = fitted.get("max_side_px")  # missing in older cards
        sizes = tuple(fitted.get("sizes", ()))
        how = head["hidden"], head["dropout"], fitted["resize"], limit, sizes
        with nullcontext() if draws else Undrawn():
            expert = Expert(build(spec), spec, *how)
        expert.load_state_dict(safetensors.torch.load_file(weights), strict=True)
    except (KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"expert {folder} cannot be loaded: {type(error).__name__}: {reason}") from error
    return expert.eval()


def read_card(folder: str | Path) -> dict[str, Any]:
    """Return the content of an expert's `expert.json`."""
    path = Path(folder) / CARD_FILE
    card = read_record(path, "copy the expert again, or train it again", format=_FORMAT)
    if card is None:
        raise UserError(f"{folder} is not an expert: it has no {CARD_FILE}")
    return card


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute an expert's scores."""
    version = importlib.metadata.version
    versions = {"featdistill": __version__, "torch": torch.__version__}
    return versions | {"timm": version("timm"), "open_clip": version("open_clip_torch")}


def latest_experts(root: str | Path = "runs") -> list[Path]:
    """Return the experts of the run that finished last and of the other runs in the same folder.

    The four runs in `runs/paper/stage2/`, for example, are one ensemble.

    Raises:
        UserError: there is no finished run.
    """
    cards = sorted(Path(root).glob("**/expert/expert.json"), key=lambda path: path.stat().st_mtime)
    if not cards:
        raise UserError(
            f"no trained expert below {root}/; run train.py and distill.py first, or use --experts DIR"
        )
    return sorted(card.parent for card in cards if card.parents[2] == cards[-1].parents[2])


def called_linear_layers(expert: Expert) -> list[str]:
    """Return the names of the backbone's linear layers that a forward pass calls.

    Some attentions read the weights of a linear layer without calling it (the query projections of BEiT, and
    PyTorch's own attention, which open_clip uses); replacing such a layer has no effect, or breaks it.
    """
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in expert.backbone.named_modules()
        if isinstance(module, nn.Linear)
    ]
    size, was_training = expert.preprocessing.size, expert.training
    expert.eval()
    with torch.no_grad():
        expert(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=expert.mean.device))
    expert.train(was_training)
    for hook in hooks:
        hook.remove()
    return sorted(called)
