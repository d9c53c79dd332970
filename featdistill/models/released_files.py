"""The authors' released files: their manifest, its verification, and their tensors.

The manifest, `manifest.json` next to the files, is `{"schema_version": 1, "files": {NAME: {"size_bytes": ...,
"sha256": ..., "num_heads": ...}}}`, where `num_heads` is optional.
"""

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
from featdistill.records.provenance import read_record

MANIFEST_FILE = "manifest.json"
_SCHEMA_VERSION = 1
# A name becomes a folder and a column, so it must not lead elsewhere.
_FILE_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)\.pth")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TOWER, _INNER = "vision_encoder.", "vision_model."
# A buffer of older versions of transformers, which counts up from 0.
_POSITION_IDS = "embeddings.position_ids"


@dataclass(frozen=True)
class ReleasedFile:
    """A file as the manifest describes it; `num_heads` is that of its backbone's attention, if stated."""

    path: Path
    size_bytes: int
    sha256: str
    num_heads: int | None = None


def read_manifest(folder: str | Path) -> dict[str, ReleasedFile]:
    """Read the manifest of a folder of released files, but not the files.

    Returns:
        Files by their names without `.pth`, in the manifest's order.

    Raises:
        UserError: there is no manifest, or it has another format.
    """
    path = Path(folder) / MANIFEST_FILE
    content = read_record(path, "download it again")
    if content is None:
        raise UserError(f"{folder} has no released experts: it has no {MANIFEST_FILE}")
    version = content.get("schema_version")
    if version != _SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version}; this version reads {_SCHEMA_VERSION}")
    entries = content.get("files")
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path} lists no files")
    files = {}
    for name, entry in entries.items():
        match = _FILE_NAME.fullmatch(name)
        if not match:
            raise UserError(f"{path} lists the file {name!r}; a name must be plain and end in .pth")
        entry = entry if isinstance(entry, dict) else {}
        size, sha256, heads = (entry.get(key) for key in ("size_bytes", "sha256", "num_heads"))
        sha256 = sha256.lower() if isinstance(sha256, str) else ""
        for key, is_valid in (
            ("size_bytes", type(size) is int),
            ("sha256", _SHA256.fullmatch(sha256)),
            ("num_heads", heads is None or (type(heads) is int and heads > 0)),
        ):
            if not is_valid:
                raise UserError(f"{path}: {key} of {name} is {entry.get(key)!r}, which is not valid")
        files[match[1]] = ReleasedFile(Path(folder) / name, size, sha256, heads)
    return files


def verify(files: Iterable[ReleasedFile]) -> None:
    """Compare files with their manifest: first all sizes, which takes no time, then all SHA-256.

    Raises:
        UserError: a file is missing or differs.
    """
    files = list(files)
    for file in files:
        if not file.path.is_file():
            raise UserError(f"{file.path} does not exist, but {MANIFEST_FILE} lists it")
        size = file.path.stat().st_size
        if size != file.size_bytes:
            raise UserError(
                f"{file.path} has {size} bytes, {MANIFEST_FILE} says {file.size_bytes}; download it again"
            )
    for file in files:
        sha256 = atomic.sha256_of(file.path)
        if sha256 != file.sha256:
            raise UserError(
                f"{file.path} has the SHA-256 {sha256}, {MANIFEST_FILE} says {file.sha256}; download it again"
            )


class ReleasedTensors:
    """The weights of a file by their names without prefixes; each can be taken once.

    Depending on its version, transformers spells the names of a tower with or without `vision_model.`.

    Raises:
        UserError: the file is not a state dict of an image tower and a classifier.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, Tensor] = {}
        self._spelling: dict[str, str] = {}
        self._prefix = _TOWER
        for key, value in read_state(path).items():
            name = key.removeprefix(_TOWER)
            if name.startswith(_INNER):
                name, self._prefix = name.removeprefix(_INNER), _TOWER + _INNER
            if key.startswith(_TOWER) == key.startswith("classifier."):
                raise UserError(f"{path} has the key {key}, which no released expert has")
            if name in self._spelling:
                raise UserError(f"{path} has {name} twice, as {self._spelling[name]} and as {key}")
            self._spelling[name] = key
            if name == _POSITION_IDS:
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise UserError(f"{path}: {key} is {kind}, not a tensor of floating-point numbers")
            self._tensors[name] = value

    def has(self, beginnings: tuple[str, ...]) -> bool:
        """Return whether a name begins with one of `beginnings`."""
        return any(name.startswith(beginnings) for name in self._tensors)

    def count_layers(self) -> int:
        """Return the number of transformer blocks."""
        return len({name.split(".")[2] for name in self._tensors if name.startswith("encoder.layers.")})

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Return the shape of a tensor, which must have this number of dimensions."""
        shape = tuple(self._get(name).shape)
        if len(shape) != dimensions or 0 in shape:
            raise UserError(f"{self.path}: {self.key(name)} is {shape}, expected {dimensions} sides above 0")
        return shape

    def length(self, name: str) -> int:
        """Return the length that the vector `name` has in most layers.

        If one of them is misshapen, errors then name that one and not all others.
        """
        first = f"encoder.layers.0.{name}"
        lengths = [self.shape(first, 1)[0]]
        lengths += [len(value) for key, value in self._tensors.items() if key.endswith(name) and value.ndim]
        return mode(lengths)

    def take(self, name: str, *shape: int) -> Tensor:
        """Remove a tensor of the given shape and return it as a float32 copy."""
        tensor = self._get(name)
        if tensor.shape != shape:
            raise UserError(f"{self.path}: {self.key(name)} is {tuple(tensor.shape)}, expected {shape}")
        del self._tensors[name]
        return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def key(self, name: str) -> str:
        """Return the file's spelling of a name, also of one that it does not have."""
        outside = {"classifier": "", "visual_projection": _TOWER}
        return self._spelling.get(name) or outside.get(name.split(".")[0], self._prefix) + name

    def finish(self) -> None:
        """Raise a `UserError` unless everything was taken."""
        rest = [self.key(name) for name in self._tensors]
        if rest:
            more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
            raise UserError(f"{self.path} has the key {rest[0]}{more}, which no such expert has")

    def _get(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise UserError(f"{self.path} lacks the key {self.key(name)}")
        return self._tensors[name]


def read_state(path: Path) -> dict[str, object]:
    """Return the state dict of a file, which may be the `model_state_dict` of a larger dict."""
    try:
        # Memory-mapped tensors are read when they are taken, without a second copy in memory. The format that
        # PyTorch used before zip files cannot be mapped.
        mmap = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many types for files in other formats
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a readable weights file: {type(error).__name__}: {reason}") from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path} has no state dict, neither at the top nor as model_state_dict")
    return state
