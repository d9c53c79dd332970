"""Weights of backbones: from the libraries' hubs, from local files, and those that only a file can bring.

A file is safetensors or a PyTorch state dict, which is only ever read with `weights_only=True`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import timm.models
from torch import Tensor, nn

from featdistill.command_line import UserError


@dataclass(frozen=True)
class FileWeights:
    """Published weights that neither library downloads.

    Attributes:
        source: the file and who publishes it.
        licence: its licence, in words.
        encoder: the file's name for the part that is the image encoder.
        mean, std: normalisation it was trained with.
    """

    source: str
    licence: str
    encoder: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# By the tag that stands for them behind the name of a timm architecture.
FILE_WEIGHTS: dict[str, FileWeights] = {
    # https://github.com/facebookresearch/moco-v3, CONFIG.md and main_moco.py (ImageNet's mean and std).
    "mocov3": FileWeights(
        "vit-b-300ep.pth.tar of facebookresearch/moco-v3",
        "CC BY-NC 4.0",
        "base_encoder.",
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    ),
}


def from_hub(name: str, create: Callable[[], nn.Module]) -> nn.Module:
    """Return what `create` builds with downloaded weights.

    Raises:
        UserError: they are not to be had.
    """
    try:
        return create()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the weights of {name} could not be had from the hub ({first_line(error)}); "
            "download them once and give the file with --weights FILE"
        ) from error


def load_timm_file(model: nn.Module, path: str, tag: str = "") -> None:
    """Load a local file strictly into a timm model; a classifier that the model does not have is left out.

    Files of a family's original authors are translated by timm, and tables of positions are resized.

    Args:
        tag: a key of `FILE_WEIGHTS` where the file is expected to be that one.

    Raises:
        UserError: the file is no weights file, or does not fit the model.
    """
    try:
        state = timm.models.load_state_dict(path, weights_only=True)
    except Exception as error:  # safetensors and torch raise a zoo of types for a file that is none of theirs
        raise UserError(f"{path} is no readable weights file: {first_line(error)}") from error
    if tag in FILE_WEIGHTS:
        state = _encoder_only(state, FILE_WEIGHTS[tag].encoder)
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = translate(state, model) if translate else state
        own = model.state_dict().keys()
        state = {key: value for key, value in state.items() if key in own or not key.startswith(classifier)}
        model.load_state_dict(state, strict=True)
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not fit {type(model).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def _encoder_only(state: dict[str, Tensor], encoder: str) -> dict[str, Tensor]:
    """Return the encoder of a self-supervised checkpoint, without its projector and its siblings.

    A file without such a part is taken to be the encoder already.
    """
    found = {key.removeprefix(encoder): value for key, value in state.items() if key.startswith(encoder)}
    # The projector of MoCo v3 sits where a classifier would.
    return {key: value for key, value in found.items() if not key.startswith("head.")} or state


def first_line(error: Exception) -> str:
    """Return what an error of a library says, short enough for one line."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
