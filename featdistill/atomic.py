"""Files and folders that are either there whole or not at all: written beside, then renamed into place."""

import csv
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Give the body a temporary path beside `path`; it becomes `path` when the body ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Like `replace_file` for a folder: an old folder is removed once the new one stands in its place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    former = path.with_name(f".{path.name}.old")
    # What a killed run left.
    shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(former, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        if path.exists():
            os.replace(path, former)
        try:
            os.replace(beside, path)
        except OSError:
            if former.exists():
                os.replace(former, path)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 with unix line ends."""
    with replace_file(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n")


def csv_text(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Return a CSV with unix line ends; a float is written with as many digits as give it back."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def write_zip(path: str | Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a zip of uncompressed members with fixed times, so that the same members give the same bytes.

    Args:
        members: (name in the archive, content), in the order in which they are written.
    """
    with replace_file(path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members:
            # 1980 is the earliest year that a zip can hold; 3 is unix, whatever the machine.
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, data)


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
