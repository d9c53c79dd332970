"""The members of an archive in a few arrays, which are small in memory and can be kept in a file.

An index takes the names and 80 bytes a member: every loader worker may hold one of a million members.
"""

import hashlib
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

VERSION = 1
NO_FAULT = ""
# What an index holds of a member's fault is its place here: append only, or raise `VERSION`.
FAULTS = (
    NO_FAULT,
    "leads out of the archive",
    "has a name that is no text",
    "is a symbolic link",
    "is a hard link",
    "is a device or a pipe",
    "is a sparse file",
    "is encrypted",
    "is compressed by a method other than deflate",
)
# Control characters, and what stands for bytes that are no UTF-8.
NO_TEXT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


class Entry(NamedTuple):
    """A member: its fault (one of `FAULTS`), and where its bytes are, as its archive's reader takes it."""

    name: str
    fault: str
    offset: int
    size: int
    stored_size: int
    crc32: int
    method: int


def name_fault(name: str) -> str:
    """Return why a member's name is refused (`leads out of the archive`), or nothing."""
    name = name.replace("\\", "/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        return "leads out of the archive"
    return "has a name that is no text" if NO_TEXT.search(name) else NO_FAULT


# A member's row. Types and byte order are fixed, since rows are kept in files.
_NUMBERS = ("name_start", "name_size", "fault", "offset", "size", "stored_size", "crc32", "method")
_ROW = np.dtype([(number, "<i8") for number in _NUMBERS])


class Index:
    """The members of an archive in arrays; of several of one name, the last counts, as when unpacking.

    Attributes:
        damage: why the list may end too early; empty for a whole archive.
    """

    def __init__(
        self, names: bytes, rows: np.ndarray, keys: np.ndarray, order: np.ndarray, damage: str = ""
    ) -> None:
        """Take what `build` makes and `load` checks.

        Args:
            names: all names, one after the other.
            rows: (N,) of type `_ROW`, in the order of the archive.
            keys: (N,) uint64, the names' hashes, sorted.
            order: (N,) int64, the row that each of `keys` belongs to.
        """
        self._names, self._rows, self._keys, self._order, self.damage = names, rows, keys, order, damage

    @classmethod
    def build(cls, entries: Iterable[Entry], damage: str = "") -> "Index":
        """List members in their order."""
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
        """Read an index that `save` wrote with this stamp; None where there is none, or it is another's.

        Args:
            stamp: version of the format, size and time of change of the archive.
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
        """Write the index of an undamaged archive, atomically; several processes may do so at once.

        Raises:
            OSError: the folder cannot be written to.
        """
        # A name of its own, since all workers of a loader may find the index missing at one time.
        handle, beside = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
        try:
            with os.fdopen(handle, "wb") as file:
                names, stamped = np.frombuffer(self._names, np.uint8), np.array(stamp)
                np.savez(
                    file, stamp=stamped, names=names, rows=self._rows, keys=self._keys, order=self._order
                )
            os.chmod(beside, 0o644)  # the index is no more secret than the archive
            os.replace(beside, path)
        except BaseException:
            os.unlink(beside)
            raise

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Entry]:
        return map(self._entry, range(len(self)))

    def find(self, name: str) -> Entry | None:
        """Return the member of a name."""
        encoded = _encoded(name)
        key = np.uint64(_key(encoded))
        for place in range(self._keys.searchsorted(key), len(self._keys)):
            if self._keys[place] != key:
                return None
            entry = self._entry(self._order[place])
            if entry.name == name:
                return entry
        return None

    def _entry(self, row: int) -> Entry:
        start, size, fault, *numbers = self._rows[row].item()
        name = self._names[start : start + size].decode("utf-8", "surrogateescape")
        return Entry(name, FAULTS[fault], *numbers)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _key(encoded: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
