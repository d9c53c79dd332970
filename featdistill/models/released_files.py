"""The authors' released files: what their manifest says of them, whether they are that, and their tensors.

The manifest, `manifest.json` beside the files, is `{"schema_version": 1, "files": {NAME: {"size_bytes": ...,
"sha256": ..., "num_heads": ...}}}`, where `num_heads` may be left out.
"""

import json
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mode

import torch
from torch import Tensor

from featdistill import atomic
from featdistill.command_line import UserError

MANIFEST_FILE = "manifest.json"
_SCHEMA_VERSION = 1
# A name becomes a folder and a column: it must not lead elsewhere.
_FILE_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)\.pth")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TOWER, _INNER = "vision_encoder.", "vision_model."
# Buffers that older versions of transformers wrote; they count up from 0.
_NO_WEIGHTS = ("embeddings.position_ids",)


@dataclass(frozen=True)
class ReleasedFile:
    """A file as the manifest describes it.

    Attributes:
        path: where it is.
        size_bytes: its size.
        sha256: SHA-256 of its bytes, in hexadecimal.
        num_heads: attention heads of its backbone, or None where the manifest does not say.
    """

    path: Path
    size_bytes: int
    sha256: str
    num_heads: int | None = None


def read_manifest(folder: str | Path) -> dict[str, ReleasedFile]:
    """Read the manifest of a folder of released files; the files themselves are not looked at.

    Returns:
        Files by their names without `.pth`, in the manifest's order.

    Raises:
        UserError: there is no manifest, or it is not of the form that this version reads.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no released experts: it has no {MANIFEST_FILE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != _SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version}; this version reads {_SCHEMA_VERSION}")
    entries = content.get("files")
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path} names no files")
    files = {}
    for name, entry in entries.items():
        found = _FILE_NAME.fullmatch(name)
        if not found:
            raise UserError(f"{path} names the file {name!r}; a plain name that ends in .pth is wanted")
        entry = entry if isinstance(entry, dict) else {}
        size, sha256, heads = (entry.get(key) for key in ("size_bytes", "sha256", "num_heads"))
        sha256 = sha256.lower() if isinstance(sha256, str) else ""
        for key, good in (
            ("size_bytes", type(size) is int),
            ("sha256", _SHA256.fullmatch(sha256)),
            ("num_heads", heads is None or (type(heads) is int and heads > 0)),
        ):
            if not good:
                raise UserError(f"{path}: {key} of {name} is {entry.get(key)!r}")
        files[found[1]] = ReleasedFile(Path(folder) / name, size, sha256, heads)
    return files


def verify(files: Iterable[ReleasedFile]) -> None:
    """Hold files against their manifest: first the sizes of all, which costs nothing, then their SHA-256.

    Raises:
        UserError: a file is missing or is another one.
    """
    files = list(files)
    for file in files:
        if not file.path.is_file():
            raise UserError(f"{file.path} does not exist, but {MANIFEST_FILE} names it")
        size = file.path.stat().st_size
        if size != file.size_bytes:
            raise UserError(
                f"{file.path} has {size} bytes, {MANIFEST_FILE} says {file.size_bytes}; fetch it again"
            )
    for file in files:
        sha256 = atomic.sha256_of(file.path)
        if sha256 != file.sha256:
            raise UserError(
                f"{file.path} has the SHA-256 {sha256}, {MANIFEST_FILE} says {file.sha256}; fetch it again"
            )


class ReleasedTensors:
    """The weights of a file by their names without prefixes; each is taken out once.

    transformers spells the names of a tower with or without `vision_model.`, by its version.

    Raises:
        UserError: the file is no state dict of an image tower and a classifier.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, Tensor] = {}
        self._spelling: dict[str, str] = {}
        self._prefix = _TOWER
        for key, value in _read_state(path).items():
            name = key.removeprefix(_TOWER)
            if name.startswith(_INNER):
                name, self._prefix = name.removeprefix(_INNER), _TOWER + _INNER
            if key.startswith(_TOWER) == key.startswith("classifier."):
                raise UserError(f"{path} has the key {key}, which no released expert has")
            if name in self._spelling:
                raise UserError(f"{path} has {name} twice, as {self._spelling[name]} and as {key}")
            self._spelling[name] = key
            if name in _NO_WEIGHTS:
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise UserError(f"{path}: {key} is {kind}, no tensor of floating-point numbers")
            self._tensors[name] = value

    def has(self, beginnings: tuple[str, ...]) -> bool:
        """Return whether a name begins with one of `beginnings`."""
        return any(name.startswith(beginnings) for name in self._tensors)

    def count_layers(self) -> int:
        """Return the number of transformer blocks."""
        return len({name.split(".")[2] for name in self._tensors if name.startswith("encoder.layers.")})

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Return the shape of a tensor, which must have so many dimensions."""
        shape = tuple(self._get(name).shape)
        if len(shape) != dimensions or 0 in shape:
            raise UserError(f"{self.path}: {self.key(name)} is {shape}, expected {dimensions} sides above 0")
        return shape

    def length(self, name: str) -> int:
        """Return the length of the vector `name` of the layers, as most of them have it.

        So a single misshapen one is what an error names, and not all the others.
        """
        first = f"encoder.layers.0.{name}"
        lengths = [self.shape(first, 1)[0]]
        lengths += [len(value) for key, value in self._tensors.items() if key.endswith(name) and value.ndim]
        return mode(lengths)

    def take(self, name: str, *shape: int) -> Tensor:
        """Take out a tensor of the given shape, as a float32 copy."""
        tensor = self._get(name)
        if tensor.shape != shape:
            raise UserError(f"{self.path}: {self.key(name)} is {tuple(tensor.shape)}, expected {shape}")
        del self._tensors[name]
        return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def take_pair(self, name: str, *shape: int) -> tuple[Tensor, Tensor]:
        """Take out the weight of a layer, of the given shape, and its bias, as long as its first side."""
        return self.take(f"{name}.weight", *shape), self.take(f"{name}.bias", shape[0])

    def key(self, name: str) -> str:
        """Return a name as the file spells it, or would."""
        outside = {"classifier": "", "visual_projection": _TOWER}
        return self._spelling.get(name) or outside.get(name.split(".")[0], self._prefix) + name

    def finish(self) -> None:
        """Raise a `UserError` where anything was not taken."""
        left = [self.key(name) for name in self._tensors]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise UserError(f"{self.path} has the key {left[0]}{more}, which no such expert has")

    def _get(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise UserError(f"{self.path} lacks the key {self.key(name)}")
        return self._tensors[name]


def _read_state(path: Path) -> dict[str, object]:
    """Return the state dict in a file, which may be the `model_state_dict` of a larger dict."""
    try:
        # What is mapped into memory is read when it is taken, and is no second copy. The format that PyTorch
        # wrote before its zip files cannot be mapped.
        mmap = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises a zoo of types for a file that is none of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no readable weights file: {type(error).__name__}: {reason}") from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path} holds no state dict, neither by itself nor as model_state_dict")
    return state
