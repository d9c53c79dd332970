"""Images passed through an autoencoder: the content of the original, the traces of a generator's decoder.

An autoencoder is given as `module:function`, a callable from (B, 3, H, W) float in [0, 1] to the same shape,
or as `diffusers:REPO`, the AutoencoderKL of a hub repository or a local folder; `diffusers:OWNER/NAME/vae` if
it is in the repository's folder `vae`. Only the latter need the package diffusers.
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
    """Return the autoencoder with a name as described above."""
    module, separator, rest = name.partition(":")
    if not separator or not module or not rest:
        raise UserError(f"--autoencoder {name} must be module:function or diffusers:REPO")
    if module == "diffusers":
        return _load_diffusers(rest, device)
    # For a file of the user in the current folder.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        autoencoder = getattr(importlib.import_module(module), rest)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--autoencoder {name} cannot be loaded: {error}") from error
    if isinstance(autoencoder, nn.Module):
        autoencoder = autoencoder.to(device).eval()
    if not callable(autoencoder):
        raise UserError(f"--autoencoder {name} is not callable")
    return autoencoder


def generator_name(autoencoder: str) -> str:
    """Return the generator of reconstructions: `AutoencoderKL REPO`, or the function as it was given."""
    library, _, rest = autoencoder.partition(":")
    return f"AutoencoderKL {rest}" if library == "diffusers" else autoencoder


def reconstruct(
    autoencoder: Autoencoder, images: Sequence[np.ndarray], device: torch.device
) -> list[np.ndarray]:
    """Pass images through an autoencoder, those of one size together.

    Sides are padded to multiples of 32 px, by reflection, and the padding is cut off again.

    Args:
        images: N arrays (H, W, 3) uint8 RGB of any sizes.

    Returns:
        N arrays of the images' shapes, uint8.

    Raises:
        UserError: the autoencoder changes the shape.
    """
    results: list[np.ndarray | None] = [None] * len(images)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for position, image in enumerate(images):
        by_size.setdefault(image.shape[:2], []).append(position)
    for (height, width), positions in by_size.items():
        batch = torch.from_numpy(np.stack([images[position] for position in positions])).to(device)
        batch = _enlarge(batch.permute(0, 3, 1, 2).float() / 255)
        with torch.inference_mode(), reproducible():
            output = autoencoder(batch)
        if not isinstance(output, Tensor) or output.shape != batch.shape:
            shape = tuple(getattr(output, "shape", ()))
            raise UserError(f"the autoencoder turns {tuple(batch.shape)} into {shape}; it must keep it")
        output = (output.float().clamp(0, 1) * 255).round().to(torch.uint8)[..., :height, :width]
        for position, image in zip(positions, output.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            results[position] = np.ascontiguousarray(image)
    return results


def _enlarge(batch: Tensor) -> Tensor:
    # Reflection can add at most the side's length minus one, so a small image needs several rounds.
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
        # Not an import statement: the project does not require it.
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise UserError("--autoencoder diffusers:... needs the package diffusers: pip install it") from error
    owner_and_name, folder = name, ""
    if not Path(name).is_dir() and name.count("/") > 1:
        parts = name.split("/")
        owner_and_name, folder = "/".join(parts[:2]), "/".join(parts[2:])
    options = {"subfolder": folder} if folder else {}
    try:
        # Safetensors only: other weights in a repository are pickled.
        model = diffusers.AutoencoderKL.from_pretrained(owner_and_name, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--autoencoder diffusers:{name} cannot be loaded: {reason}") from error
    model = model.to(device).eval()

    def through(images: Tensor) -> Tensor:
        # The mode of the encoder's distribution instead of a sample, so that the result is reproducible.
        latent = model.encode(images * 2 - 1).latent_dist.mode()
        return model.decode(latent).sample / 2 + 0.5

    return through
