"""Images passed through an autoencoder: the scene of the original, the traces of a generator's decoder.

An autoencoder is named `module:function`, a callable that takes (B, 3, H, W) float in [0, 1] to the same, or
`diffusers:REPO`, the AutoencoderKL of a hub repository or a local folder; `diffusers:OWNER/NAME/vae` where it
lies in a folder `vae` of it. The package diffusers is needed for the latter only.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from data_prep.attacks.adversarial import reproducible
from featdistill.command_line import UserError

Autoencoder = Callable[[Tensor], Tensor]
# An AutoencoderKL reduces by 8, some others by 16 or 32.
_MULTIPLE_PX = 32


def load_autoencoder(name: str, device: torch.device) -> Autoencoder:
    """Return the autoencoder of a name; see above.

    Raises:
        UserError: there is no such module, function or repository, or diffusers is not installed.
    """
    module, separator, rest = name.partition(":")
    if not separator or not module or not rest:
        raise UserError(f"--autoencoder {name} must be module:function or diffusers:REPO")
    if module == "diffusers":
        return _load_diffusers(rest, device)
    # Of the user's own file in the folder where the command is given.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), rest)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--autoencoder {name} cannot be had: {error}") from error
    if isinstance(found, nn.Module):
        found = found.to(device).eval()
    if not callable(found):
        raise UserError(f"--autoencoder {name} is no function")
    return found


def reconstruct(
    autoencoder: Autoencoder, images: Sequence[np.ndarray], device: torch.device
) -> list[np.ndarray]:
    """Pass images through an autoencoder, those of one size together.

    The autoencoder sees sides that are multiples of 32 px; what is added for that, by reflection, is cut off
    again.

    Args:
        images: N arrays (H, W, 3) uint8 RGB of any sizes.

    Returns:
        N arrays of the images' shapes, uint8.

    Raises:
        UserError: the autoencoder gives another shape than it takes.
    """
    results: list[np.ndarray | None] = [None] * len(images)
    places: dict[tuple[int, ...], list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.shape[:2], []).append(place)
    for (height, width), own in places.items():
        batch = torch.from_numpy(np.stack([images[place] for place in own])).to(device)
        batch = _enlarge(batch.permute(0, 3, 1, 2).float() / 255)
        with torch.inference_mode(), reproducible():
            found = autoencoder(batch)
        if not isinstance(found, Tensor) or found.shape != batch.shape:
            shape = tuple(getattr(found, "shape", ()))
            raise UserError(f"the autoencoder makes {shape} of {tuple(batch.shape)}; both must be the same")
        found = (found.float().clamp(0, 1) * 255).round().to(torch.uint8)[..., :height, :width]
        for place, image in zip(own, found.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            results[place] = np.ascontiguousarray(image)
    return results


def _enlarge(batch: Tensor) -> Tensor:
    # Reflection can add no more than a side's length less one, so that a small image needs several rounds.
    missing = [-side % _MULTIPLE_PX for side in batch.shape[-2:]]
    while any(missing):
        added = [min(extra, max(side - 1, 0)) for extra, side in zip(missing, batch.shape[-2:], strict=True)]
        mode = "reflect" if any(added) else "replicate"
        added = added if any(added) else missing
        batch = pad(batch, (0, added[1], 0, added[0]), mode=mode)
        missing = [extra - more for extra, more in zip(missing, added, strict=True)]
    return batch


def _load_diffusers(name: str, device: torch.device) -> Autoencoder:
    try:
        # By its name: the project does not require it.
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise UserError(
            "--autoencoder diffusers:... needs the package diffusers, which is not installed: "
            "pip install diffusers, or give module:function"
        ) from error
    owner_and_name, folder = name, ""
    if not Path(name).is_dir() and name.count("/") > 1:
        parts = name.split("/")
        owner_and_name, folder = "/".join(parts[:2]), "/".join(parts[2:])
    options = {"subfolder": folder} if folder else {}
    try:
        # Safetensors only: what else a repository may hold is pickled.
        model = diffusers.AutoencoderKL.from_pretrained(owner_and_name, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--autoencoder diffusers:{name} cannot be had: {reason}") from error
    model = model.to(device).eval()

    def through(images: Tensor) -> Tensor:
        # The mode of the encoder's distribution instead of a sample: the same image every time.
        latent = model.encode(images * 2 - 1).latent_dist.mode()
        return model.decode(latent).sample / 2 + 0.5

    return through
