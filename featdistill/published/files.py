"""Files of published detectors: downloaded once, compared with what is known of them, and read strictly."""

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.models.released_files import read_state
from featdistill.models.weights import first_line
from featdistill.published.entry import Published, PublishedGraph, Source

# What PyTorch puts before the names of a model trained on several GPUs.
_PARALLEL = "module."


def fetch(name: str, source: Source) -> Path:
    """Return the file of the detector `name`, from the cache or downloaded.

    Raises:
        UserError: it is not in the cache and cannot be downloaded.
    """
    try:
        if source.host == "huggingface.co":
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(source.repository, source.file, revision=source.revision))
        # The folder in which PyTorch keeps downloads.
        target = Path(torch.hub.get_dir(), "checkpoints", f"{source.revision[:12]}-{Path(source.file).name}")
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source.address, str(target), progress=False)
        return target
    except Exception as error:  # the clients raise many types
        raise UserError(
            f"cannot download {source.page} ({first_line(error)}); download it elsewhere and write "
            f"published:{name}=FILE"
        ) from error


def verify(path: Path, name: str, entry: Published | PublishedGraph) -> str:
    """Return the SHA-256 of a file.

    Raises:
        UserError: the file does not exist or is not the published one.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; download it from {entry.source.page}")
    sha256 = atomic.sha256_of(path)
    checks = [("SHA-256", sha256, entry.sha256)]
    if entry.git_blob:
        checks.append(("git blob", _git_blob(path), entry.git_blob))
    for kind, found, expected in checks:
        if expected and found != expected:
            raise UserError(
                f"{path} is not the file of {name}: its {kind} is {found}, not {expected}; download "
                f"{entry.source.page}"
            )
    return sha256


def _git_blob(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def read(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file, which has exactly those with these names and shapes.

    Training scripts save them under `model`, `state_dict` or `net`, perhaps with `module.` before every name.
    Next to them may be their command line, an `argparse.Namespace`; no other class is loaded.

    Args:
        expected: tensors of these shapes; numbers in floating point become float32.

    Raises:
        UserError: it is not a file of weights, or has other names or shapes.
    """
    if path.suffix == ".safetensors":
        try:
            state = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is not a readable weights file: {first_line(error)}") from error
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = read_state(path)
        inner = [state[key] for key in ("model", "state_dict", "net") if isinstance(state.get(key), dict)]
        state = inner[0] if inner else state
        if all(str(key).startswith(_PARALLEL) for key in state):
            state = {key.removeprefix(_PARALLEL): value for key, value in state.items()}
    for what, names in (
        ("lacks the key", expected.keys() - state.keys()),
        ("has the unexpected key", state.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path} {what} {min(names, key=str)}{more}")
    for name, like in expected.items():
        value, is_float = state[name], like.is_floating_point()
        is_tensor = isinstance(value, Tensor)
        if not is_tensor or value.is_floating_point() != is_float or value.shape != like.shape:
            found = f"{tuple(value.shape)} {value.dtype}" if is_tensor else type(value).__name__
            kind = "floating point" if is_float else "whole numbers"
            raise UserError(f"{path}: {name} is {found}, expected {tuple(like.shape)} in {kind}")
    return {name: state[name].to(like.dtype).contiguous() for name, like in expected.items()}
