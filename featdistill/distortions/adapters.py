"""Distortions of the challenge that need models this project does not ship.

An adapter is `adapter(image, level, rng) -> image`, under the contract of `featdistill/operations.py`; the
size may change. Any installed package provides one by an entry point of the group `featdistill.distortions`
whose name is the distortion's, in its pyproject.toml:

    [project.entry-points."featdistill.distortions"]
    jpeg_ai = "my_package.my_module:my_function"

`cheng2020` needs no such package where compressai is installed. Compressai unpickles the weights that it
downloads; this project loads none of them itself.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata

import numpy as np

from featdistill.command_line import UserError, one_of
from featdistill.distortions.operation import MIN_SIDE_PX

GROUP = "featdistill.distortions"
Adapter = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
_CHENG2020 = ("compressai", "compressai.zoo:cheng2020_anchor")


@dataclass(frozen=True)
class Adapted:
    """What is known of a distortion that comes from elsewhere.

    Attributes:
        what: what it does to an image.
        splits: the splits of the challenge that have it.
        scales: the parameter at level 1 .. 5.
        install: what provides it besides an entry point, if anything does.
    """

    what: str
    splits: str
    scales: tuple[float, float, float, float, float]
    install: str = ""


# The presets of jpeg_ai and the strengths of adv_embed are those of val_hard's label files; there are four
# presets, so the last one stands twice. For the others none are published: cheng2020 has five of compressai's
# six qualities, wmforger the level itself. Without numpy>=2, pip may replace NumPy by one of before 2.
_COMPRESSAI = 'compressai: pip install compressai "numpy>=2"'
_STRENGTHS = (4, 6, 8, 10, 12)
ADAPTED: dict[str, Adapted] = {
    "jpeg_ai": Adapted("the neural codec JPEG AI", "val_hard, test", (0, 1, 2, 3, 3)),
    "cheng2020": Adapted("the neural codec of Cheng et al. 2020", "test", (5, 4, 3, 2, 1), _COMPRESSAI),
    "wmforger": Adapted("a forged invisible watermark", "test", (1, 2, 3, 4, 5)),
    "adv_embed_resnet": Adapted("an attack on ResNet embeddings", "val_hard, test", _STRENGTHS),
    "adv_embed_clip": Adapted("an attack on CLIP embeddings", "val_hard, test", _STRENGTHS),
}


def is_available(name: str) -> bool:
    """Return whether something installed provides a distortion; nothing is imported to find out.

    Raises:
        UserError: the name is none of `ADAPTED`.
    """
    return bool(_entry_points(name)) or _has_builtin(name)


def find(name: str) -> Adapter:
    """Return the adapter of a distortion: the one of an entry point, or else the one built in here.

    Raises:
        UserError: the name is none of `ADAPTED`, nothing provides it, several packages do, or the one that
            does cannot be loaded.
    """
    return _find(name)[0]


def apply(name: str, image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Apply a distortion and check what its adapter gives back.

    Args:
        name: one of `ADAPTED`.
        image: (H, W, 3) uint8 RGB; it is not changed.
        level: 1 .. 5.
        rng: where every random choice comes from.

    Returns:
        A new (H', W', 3) uint8 RGB array.

    Raises:
        UserError: as for `find`, or the adapter returned something else.
    """
    adapter, package = _find(name)
    # A copy, so that code from elsewhere can neither change nor return the caller's image.
    result = adapter(image.copy(order="C"), level, rng)
    shape, dtype = getattr(result, "shape", ()), getattr(result, "dtype", None)
    is_image = isinstance(result, np.ndarray) and dtype == np.uint8 and len(shape) == 3 and shape[2] == 3
    if not is_image or min(shape[:2]) < MIN_SIDE_PX:
        returned = f"{dtype} of shape {shape}" if isinstance(result, np.ndarray) else type(result).__name__
        raise UserError(
            f"the adapter {name} of package {package} returned {returned}; it must return a uint8 array "
            f"(H, W, 3) of at least {MIN_SIDE_PX} px a side"
        )
    return result


# Kept, because a look through all installed packages takes milliseconds.
@cache
def _find(name: str) -> tuple[Adapter, str]:
    """Return the adapter and the name of the package that provides it."""
    found = _entry_points(name)
    if not found and _has_builtin(name):
        return partial(_cheng2020, _load(name, *_CHENG2020)), _CHENG2020[0]
    if not found:
        adapted = ADAPTED[name]
        raise UserError(
            f"distortion {name} ({adapted.what}) is not part of this project; install "
            + (f"{adapted.install}; or " if adapted.install else "")
            + f"a package that provides it as entry point '{name}' of group '{GROUP}'"
        )
    packages = sorted(point.dist.name for point in found)
    if len(found) > 1:
        raise UserError(f"distortion {name} comes with {' and with '.join(packages)}; uninstall all but one")
    return _load(name, packages[0], found[0].value), packages[0]


def _entry_points(name: str) -> list[metadata.EntryPoint]:
    one_of("adapted distortion", name, ADAPTED)
    return list(metadata.entry_points(group=GROUP, name=name))


def _has_builtin(name: str) -> bool:
    return name == "cheng2020" and importlib.util.find_spec(_CHENG2020[0]) is not None


def _load(name: str, package: str, place: str) -> Callable:
    try:
        loaded = metadata.EntryPoint(name, place, GROUP).load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"distortion {name}: {place} of package {package} cannot be loaded ({error}); reinstall it"
        ) from error
    if not callable(loaded):
        raise UserError(f"distortion {name}: {place} of package {package} is no function; update the package")
    return loaded


def _cheng2020(zoo_model: Callable, image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    torch = importlib.import_module("torch")
    # A worker of a data loader cannot use the GPU where the process that it was forked from does.
    in_worker = torch.utils.data.get_worker_info() is not None
    device = "cuda" if torch.cuda.is_available() and not in_worker else "cpu"
    model = _pretrained(zoo_model, ADAPTED["cheng2020"].scales[level - 1], device)
    height, width = image.shape[:2]
    # The model halves the sides six times.
    padded = np.pad(image, ((0, -height % 64), (0, -width % 64), (0, 0)), mode="edge")
    with torch.inference_mode():
        values = torch.from_numpy(padded).to(device).permute(2, 0, 1)[None].float() / 255
        decoded = model(values)["x_hat"][0, :, :height, :width].permute(1, 2, 0)
        return (255 * decoded.clamp(0, 1)).round().byte().contiguous().cpu().numpy()


@cache
def _pretrained(zoo_model: Callable, quality: int, device: str) -> Callable:
    try:
        model = zoo_model(quality, metric="mse", pretrained=True)
    except OSError as error:  # URLError and HTTPError are kinds of it.
        raise UserError(
            f"distortion cheng2020: compressai cannot load its weights of quality {quality} ({error}); "
            "connect to the network once, or copy torch's hub cache from a machine that has them"
        ) from error
    return model.eval().to(device)
