"""The members of an archive in a few arrays, compact enough for memory and saved in a file.

An index needs the names and 80 bytes per member, so every loader worker can hold one of a million members.
"""

import hashlib
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from featdistill.images.listing import INVALID_IN_NAMES

VERSION = 2
NO_FAULT = ""
# An index stores a fault as its position here: append only, or raise `VERSION`.
FAULTS = (
    NO_FAULT,
    "leads out of the archive",
    "has control characters or invalid UTF-8 in its name",
    "is a symbolic link",
    "is a hard link",
    "is a device or a pipe",
    "is a sparse file",
    "is encrypted",
    "is compressed by a method other than deflate",
)


class Entry(NamedTuple):
    """A member: its name, its fault (one of `FAULTS`), and where its bytes are in the archive."""

    name: str
    fault: str
    offset: int
    size: int
    stored_size: int
    crc32: int
    method: int


def name_fault(name: str) -> str:
    """Return the fault of a member's name, or `NO_FAULT`."""
    name = name.replace("\\", "/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        return FAULTS[1]
    return FAULTS[2] if INVALID_IN_NAMES.search(name) else NO_FAULT


def normalized(name: str) -> str:
    """Return a member's name without `.` and empty parts: `./a//b` is `a/b`."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


# A member's row. Types and byte order are fixed, because rows are saved in files.
_NUMBERS = ("name_start", "name_size", "fault", "offset", "size", "stored_size", "crc32", "method")
_ROW = np.dtype([(number, "<i8") for number in _NUMBERS])


@dataclass(frozen=True, eq=False)
class Index:
    """The members of an archive in arrays; of several with one name, the last counts, as when unpacking.

    Attributes:
        names: all names, one after the other.
        rows: (N,) of type `_ROW`, in the order of the archive.
        keys: (N,) uint64, the sorted hashes of the names.
        order: (N,) int64, the row of each key.
        damage: why the list may be incomplete; empty for an intact archive.
    """

    names: bytes
    rows: np.ndarray
    keys: np.ndarray
    order: np.ndarray
    damage: str = ""

    @classmethod
    def build(cls, entries: Iterable[Entry], damage: str = "") -> "Index":
        """Index members in their order."""
        last: dict[str, Entry] = {}
        for entry in entries:
            last.pop(entry.name, None)
            last[entry.name] = entry
        names = [_encoded(name) for name in last]
        rows = np.empty(len(names), _ROW)
        start = 0
        for row, (name, entry) in enumerate(zip(names, last.values(), strict=True)):
            rows[row] = (start, len(name), FAULTS.index(entry.fault), *entry[2:])
            start += len(name)
        keys = np.array([_key(name) for name in names], "<u8")
        order = np.argsort(keys, kind="stable").astype("<i8")
        return cls(b"".join(names), rows, keys[order], order, damage)

    @classmethod
    def load(cls, path: str, stamp: list[int]) -> "Index | None":
        """Read an index that `save` wrote with this stamp; None if there is none or it has another stamp.

        A stamp is the version of the format, and size and modification time of the archive.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                names, rows, keys, order = (file[name] for name in ("names", "rows", "keys", "order"))
                if file["stamp"].tolist() != stamp:
                    return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None
        kinds = [array.dtype == kind for array, kind in ((rows, _ROW), (keys, "<u8"), (order, "<i8"))]
        if not all(kinds) or not len(rows) == len(keys) == len(order):
            return None
        limits = {"fault": len(FAULTS) - 1, "offset": stamp[1], "size": stamp[1], "name_start": len(names)}
        values = [(rows[name], limit) for name, limit in limits.items()] + [(order, len(rows) - 1)]
        if any(np.any((array < 0) | (array > limit)) for array, limit in values):
            return None
        return cls(names.tobytes(), rows, keys, order)

    def save(self, path: str, stamp: list[int]) -> None:
        """Write the index of an intact archive atomically; several processes may do so at once.

        Raises:
            OSError: the folder cannot be written to.
        """
        # A unique name, because all workers of a loader may find the index missing at the same time.
        handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
        try:
            with os.fdopen(handle, "wb") as file:
                arrays = {"rows": self.rows, "keys": self.keys, "order": self.order}
                np.savez(file, stamp=np.array(stamp), names=np.frombuffer(self.names, np.uint8), **arrays)
            os.chmod(temporary, 0o644)  # the index is no more secret than the archive
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Entry]:
        return map(self._entry, range(len(self)))

    def find(self, name: str) -> Entry | None:
        """Return the member with a name."""
        encoded = _encoded(name)
        key = np.uint64(_key(encoded))
        for position in range(self.keys.searchsorted(key), len(self.keys)):
            if self.keys[position] != key:
                return None
            entry = self._entry(self.order[position])
            if entry.name == name:
                return entry
        return None

    def _entry(self, row: int) -> Entry:
        start, size, fault, *numbers = self.rows[row].item()
        name = self.names[start : start + size].decode("utf-8", "surrogateescape")
        return Entry(name, FAULTS[fault], *numbers)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _key(encoded: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
