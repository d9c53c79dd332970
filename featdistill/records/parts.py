"""A manifest in parts: a folder of parquet files, for more rows than one process should hold.

Each file has columns of a manifest (see `featdistill.records.manifest`), as text or as numbers. Parts may be
added later, and are read in the order of their names. A part that has been scored must not change.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from featdistill import atomic, remote_files
from featdistill.command_line import UserError
from featdistill.storage import Folder, is_remote

SUFFIX = ".parquet"
# In a folder of scores in parts: what made them.
RECORD = "predictions.json"
# Holds the sizes, places and ranges of all columns of a part.
_END_BYTES = 1 << 16


def has_parts(path: str | Path) -> bool:
    """Return whether this names a folder of parts, not a CSV."""
    return not str(path).lower().endswith(".csv") if is_remote(path) else Path(path).is_dir()


class Stamp(NamedTuple):
    """Hashes of a part: of its file, and of the file's size and end, which change with its rows."""

    sha256: str
    mark: str


class Parts:
    """The parts of a manifest.

    Attributes:
        names: of the files, sorted.

    Raises:
        UserError: the folder holds no parquet file.
    """

    def __init__(self, address: str | Path) -> None:
        self.folder = Folder(address)
        self.names = self.folder.names(SUFFIX)
        if not is_remote(address) and (inner := next(Path(address).glob(f"*/*{SUFFIX}"), None)):
            raise UserError(
                f"{address} has parts in subfolders, such as {inner}; put them into the folder itself"
            )
        if not self.names:
            raise UserError(f"{address} is not a manifest in parts: it holds no {SUFFIX} files")

    def where(self, name: str) -> str:
        """Return the path or address of a part, for messages."""
        return f"{self.folder.address}/{name}"

    def read(self, name: str) -> tuple[pd.DataFrame, Stamp]:
        """Return the cells of a part as they are, and the hashes of its file.

        Raises:
            UserError: it is not a readable parquet file, or lacks a column.
        """
        try:
            data = self.folder.read(name)
            frame = pq.read_table(io.BytesIO(data)).to_pandas()
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these types
            raise self._unreadable(name, error) from error
        if missing := [column for column in ("image", "name") if column not in frame]:
            raise UserError(f"{self.where(name)} is not a part of a manifest: column {missing[0]} is missing")
        stamp = Stamp(hashlib.sha256(data).hexdigest(), _mark(len(data), data[-_END_BYTES:]))
        return frame.reset_index(drop=True), stamp

    def count(self, name: str) -> int:
        """Return the number of a part's rows, from the end of its file alone."""
        try:
            with self.folder.open(name) as file:
                return pq.read_metadata(file).num_rows
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from error

    def mark(self, name: str) -> str:
        """Return the `mark` of a part's `Stamp`; cheap to read."""
        with self.folder.open(name) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - _END_BYTES))
            return _mark(size, file.read())

    def columns(self, names: Iterable[str]) -> Iterator[pd.DataFrame]:
        """Yield these columns of each part."""
        for name in self.names:
            try:
                with self.folder.open(name) as file:
                    yield pq.read_table(file, columns=list(names)).to_pandas()
            except (OSError, ValueError) as error:
                raise self._unreadable(name, error) from error

    def sha256(self) -> str:
        """Return a hash of the names and the bytes of all parts."""
        hashes = [f"{name} {hashlib.sha256(self.folder.read(name)).hexdigest()}\n" for name in self.names]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def _unreadable(self, name: str, error: Exception) -> UserError:
        return UserError(f"{self.where(name)} is not a readable parquet file: {' '.join(str(error).split())}")


def _mark(size: int, end: bytes) -> str:
    return hashlib.sha256(f"{size}:".encode() + end).hexdigest()


def content_sha256(manifest: str | Path) -> str:
    """Return the SHA-256 of a manifest's file, or of all its parts."""
    if has_parts(manifest):
        return Parts(manifest).sha256()
    is_address = is_remote(manifest)
    return (
        hashlib.sha256(remote_files.read(manifest)).hexdigest() if is_address else atomic.sha256_of(manifest)
    )


def part_name(number: int) -> str:
    """Return the file name of a part, from its number."""
    return f"part-{number:06d}{SUFFIX}"


def table_bytes(columns: dict[str, object], metadata: dict[str, str] | None = None) -> bytes:
    """Return the bytes of a parquet file with these columns; the same for the same content."""
    table = pa.table(columns).replace_schema_metadata(metadata)
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue()


def repeated(names: Iterable[np.ndarray | pd.Series]) -> set[int]:
    """Return the 64-bit hashes that more than one name has; takes 8 bytes of memory per name.

    Equal names have equal hashes. That different ones do is not to be expected below 10^9 names.
    """
    hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *map(name_hashes, names)]))
    return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())


def name_hashes(names: np.ndarray | pd.Series) -> np.ndarray:
    """Return a 64-bit hash of each name, (N,) uint64."""
    return pd.util.hash_array(np.asarray(names, dtype=object), categorize=False)
