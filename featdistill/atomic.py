"""Files and folders that exist completely or not at all: written under a temporary name, then renamed."""

import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What PyTorch and safetensors say when the system refuses to write.
_REFUSALS = re.compile(r"os error (\d+)|inline_container|PytorchStreamWriter|iostream error")


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Raise an `OSError` that names `path` where the system refuses to write, also in a library's words."""
    try:
        yield
    except OSError as error:
        if error.strerror is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        refusal = _REFUSALS.search(str(error))
        if refusal is None:
            raise
        # PyTorch does not say why; a full disk is by far the most frequent reason.
        is_full = shutil.disk_usage(path.parent).free < 1 << 20
        number = int(refusal[1] or (errno.ENOSPC if is_full else errno.EIO))
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Provide a temporary path next to `path`, which becomes `path` if the body ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with system_errors(path):
            yield temporary
        with temporary.open("r+b") as written:  # Windows flushes only what is open for writing
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Like `replace_file` for a folder: an old folder is removed once the new one has replaced it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    previous = path.with_name(f".{path.name}.old")
    # What a killed run may have left.
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)
    temporary.mkdir()
    try:
        with system_errors(path):
            yield temporary
        if path.exists():
            os.replace(path, previous)
        try:
            os.replace(temporary, path)
        except OSError:
            if previous.exists():
                os.replace(previous, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 with unix line ends."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n")


def csv_text(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Return a CSV with unix line ends; floats have as many digits as it takes to restore them."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def write_zip(path: str | Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a zip of uncompressed members with fixed times, so that the same members produce the same bytes.

    Args:
        members: (name in the archive, content), in the order in which they are written.
    """
    with replace_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members:
            # 1980 is the earliest year that a zip can hold; 3 is unix, whatever the machine.
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, data)


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
