"""Weights of backbones: downloads, and published files that the libraries do not download."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from featdistill.command_line import UserError


class FileWeights(NamedTuple):
    """Published weights that neither library downloads, and the normalization they were trained with."""

    source: str
    license: str
    encoder: str  # prefix of the image encoder's keys
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# By the tag that follows the name of a timm architecture.
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
    """Return the model that `create` builds with downloaded weights.

    Raises:
        UserError: the download failed.
    """
    try:
        return create()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download the weights of {name} ({first_line(error)}); download them elsewhere and pass "
            "the file with --weights FILE"
        ) from error


def encoder_only(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the encoder of a self-supervised checkpoint, without projector, predictor and momentum encoder.

    A file without such a part is taken to be the encoder already.
    """
    encoder = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    # The projector of MoCo v3 is where a classifier would be.
    return {key: value for key, value in encoder.items() if not key.startswith("head.")} or state


def first_line(error: Exception) -> str:
    """Return a library's error message, shortened to one line."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
