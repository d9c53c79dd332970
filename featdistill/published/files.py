"""Files of published detectors: downloaded once, compared with what is known of them, and read strictly."""

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
from featdistill.published.entry import Published, Source


def fetch(source: Source) -> Path:
    """Return the file of a source, from the cache or downloaded.

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
            address = f"https://raw.githubusercontent.com/{source.repository}/{source.revision}/{source.file}"
            torch.hub.download_url_to_file(address, str(target), progress=False)
        return target
    except Exception as error:  # the clients raise many types
        raise UserError(
            f"cannot download {source.page} ({first_line(error)}); download it elsewhere and write "
            "published:NAME=FILE"
        ) from error


def verify(path: Path, name: str, entry: Published) -> str:
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


def read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the tensors of a file as float32; it has exactly those with these names and shapes.

    Raises:
        UserError: it is not a file of weights, or has other names or shapes.
    """
    if path.suffix == ".safetensors":
        try:
            state = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is not a readable weights file: {first_line(error)}") from error
    else:
        state = read_state(path)
    for what, names in (
        ("lacks the key", shapes.keys() - state.keys()),
        ("has the unexpected key", state.keys() - shapes),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path} {what} {min(names)}{more}")
    for name, shape in shapes.items():
        value = state[name]
        if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != shape:
            is_tensor = isinstance(value, Tensor)
            found = f"{tuple(value.shape)} {value.dtype}" if is_tensor else type(value).__name__
            raise UserError(f"{path}: {name} is {found}, expected {shape} in floating point")
    return {name: state[name].to(torch.float32).contiguous() for name in shapes}
