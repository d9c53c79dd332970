"""Weights of backbones: downloads, and published files that the libraries do not download."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

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


# What draws the values of a tensor. A truncated normal distribution is made of a uniform one by `erfinv_`.
_DRAWS = {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_}
_DRAWS |= {init.uniform_, init.normal_, init.kaiming_uniform_}


class Undrawn(TorchFunctionMode):
    """A context for building a module whose weights are all loaded next: none are drawn at random before.

    That takes half of the time to load a transformer. Torch's random state does not change.
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


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
