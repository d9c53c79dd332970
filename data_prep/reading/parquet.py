"""Data sets that come as parquet files: their parts, and one row of a manifest for each of their rows.

The images stay where they are: a manifest calls them `part.parquet::ROW`, with the row's number in its file,
from 0. Only the columns that describe an image are read, in batches, never the image itself.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.reading import archives
from featdistill import command_line
from featdistill.command_line import UserError, nearest
from featdistill.images import parquet as parquet_images
from featdistill.images.archives import ArchiveError
from featdistill.images.listing import ARCHIVE_SEPARATOR, absolute

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_log = logging.getLogger(__name__)
SUFFIX = ".parquet"
_ROWS_PER_BATCH = 16_384
# How the hub names the parts of a split: train-00000-of-00012.parquet.
_NUMBERED = re.compile(r"(?P<front>.*-)(?P<number>\d+)(?P<of>-of-(?P<count>\d+))")


@dataclass(frozen=True)
class Part:
    """A parquet file: its path, and its path below the root without suffix."""

    path: str
    name: str


def find_parts(root: str | Path, split: str = "") -> list[Part]:
    """Return the parquet files below a folder, or the one file given, ordered by path.

    Missing ones of numbered parts are reported. With `split`, only the parts of that split are returned.
    """
    if Path(root).is_file():
        path = Path(absolute(root))
        folder, files = str(path.parent), [path.name]
    else:
        container = archives.open_folder(root)
        archives.note_ignored([container])
        folder, files = container.path, container.files
    files = [file for file in files if file.lower().endswith(SUFFIX)]
    if not files:
        raise UserError(f"{root} holds no parquet files ({SUFFIX})")
    parts = []
    for file in sorted(files):
        part = Part(os.path.join(folder, file), archives.without_copy_number(file[: -len(SUFFIX)]))
        if same := [known for known in parts if known.name == part.name]:
            raise UserError(f"{same[0].path} and {part.path} are the same part; keep one of them")
        parts.append(part)
    splits = {_split(part) for part in parts}
    if split and split not in splits:
        raise UserError(f"{root} has no parts of split {split}, only of {', '.join(sorted(splits))}")
    parts = [part for part in parts if split in ("", _split(part))]
    for gap in _gaps(parts):
        _log.warning(f"{gap} missing; was the whole data set downloaded?")
    return parts


def read_rows(
    parts: list[Part],
    image_column: str,
    columns: Sequence[str],
    row: Callable[[dict[str, Any]], dict[str, object]],
) -> dict[str, list]:
    """Read parts into the columns of a manifest: `image`, `name` and those of `row`.

    Args:
        image_column: path of the column that holds the bytes of the images, as in `Image.bytes`.
        columns: the ones that `row` needs.
        row: returns the manifest's cells for the values of a row; a `ValueError` says what is wrong in it.

    Raises:
        UserError: a file is damaged or lacks a column, a row is wrong, or there are no rows.
    """
    rows: dict[str, list] = {}
    files = [_open(part, image_column, columns) for part in parts]
    with command_line.progress(sum(file.metadata.num_rows for file in files), "read") as bar:
        for part, file in zip(parts, files, strict=True):
            for number, values in enumerate(_values(part, file, columns)):
                try:
                    cells = row(values)
                except ValueError as error:
                    raise UserError(f"{part.path}, row {number}: {error}") from error
                cells |= {"image": f"{part.path}{ARCHIVE_SEPARATOR}{number}", "name": f"{part.name}/{number}"}
                for column, cell in cells.items():
                    rows.setdefault(column, []).append(cell)
                bar.update()
            file.close()
    if not rows:
        raise UserError(f"{parts[0].path} and the other parts hold no rows")
    return rows


def text_of(value: Any, column: str) -> str:
    """Return the text of a cell, "" for an empty one; raise a `ValueError` if it is not text."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{column} is {value!r}, which is not text")
    return (value or "").strip()


def _open(part: Part, image_column: str, columns: Sequence[str]) -> "ParquetFile":
    try:
        file = parquet_images.open_parquet(part.path)
        names = file.schema_arrow.names
        for column in (image_column.split(".")[0], *columns):
            if column not in names:
                others = f"{nearest(column, names)}; it has {', '.join(names)}: is it this data set?"
                raise UserError(f"{part.path} has no column {column}{others}")
        images = parquet_images.image_column(file.schema_arrow)
    except (ArchiveError, OSError) as error:
        raise UserError(f"{part.path}: {_line(error)}") from error
    if images != image_column:
        raise UserError(f"{part.path}: the images are in column {images}, not in {image_column}")
    return file


def _values(part: Part, file: "ParquetFile", columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow

    try:
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=list(columns)):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{part.path} is damaged ({_line(error)}); download it again") from error


def _split(part: Part) -> str:
    """Return the split of a part by its name: train-00000-of-00012, or train/0000."""
    folder, _, name = part.name.rpartition("/")
    numbered = _NUMBERED.fullmatch(name)
    if numbered:
        return numbered["front"].rstrip("-")
    return os.path.basename(folder) if name.isdigit() and folder else name.split("-")[0]


def _gaps(parts: list[Part]) -> list[str]:
    """Describe the missing ones of numbered parts, one text per series."""
    series: dict[tuple[str, str], list[int]] = {}
    for part in parts:
        numbered = _NUMBERED.fullmatch(part.name)
        if numbered:
            series.setdefault((numbered["front"], numbered["count"]), []).append(int(numbered["number"]))
    gaps = []
    for (front, count), numbers in series.items():
        missing = sorted(set(range(int(count))) - set(numbers))
        if missing:
            first = f"{front}{missing[0]:0{len(count)}d}-of-{count}"
            gaps.append(first + (f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"))
    return gaps


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
