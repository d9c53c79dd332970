"""Distortions of the challenge that need models this project does not ship.

An adapter is `adapter(image, level, rng) -> image`, under the contract of
`featdistill/distortions/operation.py`; the size may change. Any installed package can provide one by an entry
point of the group `featdistill.distortions` with the distortion's name, in its pyproject.toml:

    [project.entry-points."featdistill.distortions"]
    jpeg_ai = "my_package.my_module:my_function"

`cheng2020` also works if compressai is installed, which unpickles the weights that it downloads.
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
class External:
    """A distortion that an adapter provides; `install` is what else provides it, if anything does.

    The description says what it does and which splits use it; the rest is as for `Operation`.
    """

    category: str
    description: str
    scales: tuple[float, float, float, float, float]
    install: str = ""


# The presets of jpeg_ai and the strengths of adv_embed are those in val_hard's label files; jpeg_ai has four
# presets, so the last one is repeated. None are published for the others: cheng2020 uses five of compressai's
# six qualities, wmforger the level itself. Without numpy>=2, pip may downgrade NumPy.
_COMPRESSAI = 'compressai: pip install compressai "numpy>=2"'
_CODEC, _STRENGTHS = "neural_codec", (4, 6, 8, 10, 12)
EXTERNAL: dict[str, External] = {
    "jpeg_ai": External(_CODEC, "the neural codec JPEG AI (val_hard, test)", (0, 1, 2, 3, 3)),
    "cheng2020": External(
        _CODEC, "the neural codec of Cheng et al. 2020 (test)", (5, 4, 3, 2, 1), _COMPRESSAI
    ),
    "wmforger": External("watermark", "a forged invisible watermark (test)", (1, 2, 3, 4, 5)),
    "adv_embed_resnet": External(
        "adversarial", "an attack on ResNet embeddings (val_hard, test)", _STRENGTHS
    ),
    "adv_embed_clip": External("adversarial", "an attack on CLIP embeddings (val_hard, test)", _STRENGTHS),
}


def is_available(name: str) -> bool:
    """Return whether an installed package provides a distortion in `EXTERNAL`, without importing it."""
    return bool(_entry_points(name)) or _has_builtin(name)


def missing(name: str) -> str:
    """Return what must be installed before a distortion can be applied, or an empty string."""
    return "" if is_available(name) else EXTERNAL[name].install or "an adapter"


def apply(name: str, image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Apply a distortion and check what its adapter returns: a new (H', W', 3) uint8 RGB array.

    Raises:
        UserError: as for `find`, or the adapter returned something else.
    """
    adapter, package = find(name)
    # A copy, so foreign code can neither change nor return the caller's image.
    result = adapter(image.copy(order="C"), level, rng)
    returned, is_image = type(result).__name__, False
    if isinstance(result, np.ndarray):
        returned = f"{result.dtype} of shape {result.shape}"
        is_image = result.dtype == np.uint8 and result.ndim == 3 and result.shape[2] == 3
    if not is_image or min(result.shape[:2]) < MIN_SIDE_PX:
        raise UserError(
            f"the adapter {name} of package {package} returned {returned}; it must return a uint8 array "
            f"(H, W, 3) of at least {MIN_SIDE_PX} px per side"
        )
    return result


# Cached, because searching all installed packages takes milliseconds.
@cache
def find(name: str) -> tuple[Adapter, str]:
    """Return the adapter of a distortion, that of an entry point or else the built-in one, and its package.

    Raises:
        UserError: the name is not in `EXTERNAL`, no package provides it, several do, or it cannot be loaded.
    """
    entry_points = _entry_points(name)
    if not entry_points and _has_builtin(name):
        return partial(_cheng2020, _load(name, *_CHENG2020)), _CHENG2020[0]
    if not entry_points:
        external = EXTERNAL[name]
        raise UserError(
            f"distortion {name} ({external.description}) is not part of this project; install "
            + (f"{external.install}; or " if external.install else "")
            + f"a package that provides it as entry point '{name}' of group '{GROUP}'"
        )
    packages = sorted(point.dist.name for point in entry_points)
    if len(packages) > 1:
        raise UserError(f"several packages provide {name}: {', '.join(packages)}; uninstall all but one")
    return _load(name, packages[0], entry_points[0].value), packages[0]


def _entry_points(name: str) -> list[metadata.EntryPoint]:
    one_of("external distortion", name, EXTERNAL)
    return list(metadata.entry_points(group=GROUP, name=name))


def _has_builtin(name: str) -> bool:
    return name == "cheng2020" and importlib.util.find_spec(_CHENG2020[0]) is not None


def _load(name: str, package: str, target: str) -> Callable:
    try:
        loaded = metadata.EntryPoint(name, target, GROUP).load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"distortion {name}: {target} of package {package} cannot be loaded ({error}); reinstall it"
        ) from error
    if not callable(loaded):
        raise UserError(
            f"distortion {name}: {target} of package {package} is not a function; update the package"
        )
    return loaded


def _cheng2020(zoo_model: Callable, image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    torch = importlib.import_module("torch")
    # A data loader's worker cannot use a GPU that the process it was forked from uses.
    in_worker = torch.utils.data.get_worker_info() is not None
    device = "cuda" if torch.cuda.is_available() and not in_worker else "cpu"
    model = _pretrained(zoo_model, EXTERNAL["cheng2020"].scales[level - 1], device)
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
    except OSError as error:  # includes URLError and HTTPError
        raise UserError(
            f"distortion cheng2020: compressai cannot load its weights of quality {quality} ({error}); "
            "connect to the network once, or copy torch's hub cache from a machine that has them"
        ) from error
    return model.eval().to(device)
