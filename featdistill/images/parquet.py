"""Images in the rows of a parquet file, read in place: `part.parquet::17` is the image of row 17.

The column is found by the schema (`image_column`). A row cannot be read alone: the rows around it are decoded
with it. Each process therefore keeps the rows that it decoded last, about `WINDOW_BYTES` of one file.
Sequential reads are fast, random ones slow; `python -m data_prep.pack` turns the rows into a zip.
"""

import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from featdistill.images.archives import ArchiveError, check_size
from featdistill.remote_files import RemoteFile, is_remote

if TYPE_CHECKING:
    import pyarrow

# A row group of this size is kept whole; of a larger one, a run of rows of about this size. While decoding,
# pyarrow uses up to eight times as much, and three times a page (1,024 rows where pyarrow wrote it).
WINDOW_BYTES = 32 << 20
# Read-ahead, which keeps a large row group from being read into memory whole.
_STREAM_BYTES = 1 << 20
_REMOTE_STREAM_BYTES = 8 << 20  # each read is a request, which takes as long as a few MiB do
# Lower-case names of columns with the bytes of image files, the preferred ones first: those of data sets with
# the `datasets` library's image type, Community Forensics' `image_data`, and similar ones.
COLUMN_NAMES = (
    "image",
    "img",
    "image_data",
    "image_bytes",
    "bytes",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "picture",
)


def image_column(schema: "pyarrow.Schema") -> str:
    """Return the path of the column that holds the bytes of images: `Image.bytes`, or `image_data`.

    It is a struct with a binary field `bytes`, whatever its name, or a binary column named in
    `COLUMN_NAMES`. Of several, the one whose name comes first in that list is used.

    Raises:
        ArchiveError: there is none, or there are several and none has such a name.
    """
    from pyarrow import types

    candidates = {}
    for field in schema:
        if types.is_struct(field.type):
            index = field.type.get_field_index("bytes")
            if index >= 0 and _is_binary(field.type.field(index).type):
                candidates[field.name] = f"{field.name}.bytes"
        elif _is_binary(field.type) and field.name.lower() in COLUMN_NAMES:
            candidates[field.name] = field.name
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    for known in COLUMN_NAMES:
        for name, path in candidates.items():
            if name.lower() == known:
                return path
    columns = ", ".join(candidates or schema.names)
    if candidates:
        raise ArchiveError(f"several columns may hold the images ({columns}); rename the right one to image")
    raise ArchiveError(
        f"no column holds images: of {columns}, none is a struct with bytes, or binary and "
        f"called {' or '.join(COLUMN_NAMES)}"
    )


def open_parquet(path: str) -> "pyarrow.parquet.ParquetFile":
    """Open a parquet file.

    Raises:
        ArchiveError: pyarrow is missing, or this is not a complete parquet file.
        OSError: it cannot be opened.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ArchiveError(f"{path}: parquet files need the package pyarrow; pip install pyarrow") from error
    source, buffer_bytes = path, _STREAM_BYTES
    if is_remote(path):
        source, buffer_bytes = RemoteFile(path), _REMOTE_STREAM_BYTES
    else:
        with open(path, "rb"):  # pyarrow's own message for a missing file is several lines long
            pass
    try:
        return ParquetFile(source, buffer_size=buffer_bytes, pre_buffer=False)
    except (ArrowException, OSError) as error:
        raise ArchiveError(f"{path} is not a complete parquet file ({_line(error)})") from error


class ParquetImages:
    """The images of a parquet file; any number of threads may read them.

    Processes must not share one: a fork copies the handle, but not the file position behind it.

    Raises:
        ArchiveError: it is not a parquet file, or no column holds images.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = open_parquet(path)
        try:
            self.column = image_column(self.file.schema_arrow)
        except ArchiveError as error:
            raise ArchiveError(f"{path}: {error}") from error
        metadata = self.file.metadata
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = list(accumulate(groups, initial=0))
        self.rows = metadata.num_rows

    def read(self, row: str) -> bytes:
        """Return the bytes of the image in a row, counted from 0 through the whole file.

        Raises:
            ArchiveError: there is no such row, it holds no bytes or too many, or the file is damaged.
        """
        from pyarrow import ArrowException

        if not (row.isascii() and row.isdigit()):
            raise ArchiveError(f"{self.path}: '{row}' is not a row number")
        number = int(row)
        if number >= self.rows:
            raise ArchiveError(f"no row {row} in {self.path}, which has {self.rows}")
        try:
            cell = _window(os.getpid()).cell(self, number)
        except (ArrowException, OSError) as error:
            raise ArchiveError(f"{self.path} is damaged around row {row}: {_line(error)}") from error
        if not cell.is_valid:
            raise ArchiveError(f"row {row} of {self.path} is empty")
        buffer = cell.as_buffer()
        check_size(buffer.size)
        return buffer.to_pybytes()

    def group_of(self, row: int) -> tuple[int, int]:
        """Return the row group that holds a row, and the number of the group's first row."""
        group = bisect_right(self._starts, row) - 1
        return group, self._starts[group]

    def batches(self, group: int) -> Iterator["pyarrow.RecordBatch"]:
        """Decode a row group in runs of about `WINDOW_BYTES`."""
        metadata = self.file.metadata.row_group(group)
        columns = (metadata.column(index) for index in range(metadata.num_columns))
        sizes = (column.total_uncompressed_size for column in columns if column.path_in_schema == self.column)
        rows = max(1, min(metadata.num_rows, metadata.num_rows * WINDOW_BYTES // max(1, sum(sizes))))
        # One thread: a loader has a process per core already.
        return self.file.iter_batches(rows, row_groups=[group], columns=[self.column], use_threads=False)


class _Window:
    """The rows decoded last: one run of rows per process, however many files are open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forget()

    def cell(self, images: ParquetImages, row: int) -> "pyarrow.Scalar":
        with self._lock:
            if images is not self._images or not self._first <= row < self._first + len(self._cells):
                try:
                    self._move(images, row)
                except BaseException:
                    self._forget()
                    raise
            return self._cells[row - self._first]

    def _move(self, images: ParquetImages, row: int) -> None:
        group, first = images.group_of(row)
        start = self._first + len(self._cells)
        continues = images is self._images and group == self._group and row >= start
        if not continues:
            # Before the others are decoded, so there are never two windows in memory.
            self._forget()
            self._images, self._group, self._batches, start = images, group, images.batches(group), first
        while row >= start:
            self._cells, self._first = (), start
            batch = next(self._batches, None)
            if batch is None:
                raise ArchiveError(f"{images.path} is damaged: it ends before row {row}")
            cells = batch.column(0)
            self._cells = cells.field("bytes") if images.column.endswith(".bytes") else cells
            start += len(self._cells)

    def _forget(self) -> None:
        self._images, self._group, self._batches = None, -1, iter(())
        self._cells, self._first = (), 0


@lru_cache(maxsize=1)
def _window(process: int) -> _Window:
    """Return the window of a process: a fork must not continue what its parent began to read."""
    return _Window()


def _is_binary(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
