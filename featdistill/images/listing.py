"""The files below a folder, the same for every command: linked folders are entered, system files left out.

A location names an image wherever it is: a path, or `archive.zip::member`. Both may be at an address, such as
`s3://bucket/archive.zip::member`.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from featdistill import remote_files
from featdistill.images.formats import HEAD_BYTES, refusal_of_file
from featdistill.remote_files import is_remote

# Between an archive's path and the member's name, in the `image` column of a manifest.
ARCHIVE_SEPARATOR = "::"
_ARCHIVE_END = re.compile(r"\.(?:zip|parquet|tar|tar\.\w{1,4}|t[gbxz]\w{1,4})(?=::)", re.IGNORECASE)
# Control characters, and the surrogates that Python uses for bytes that are not UTF-8.
INVALID_IN_NAMES = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
UNPRINTABLE = re.compile("[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")
_ESCAPED = re.compile(r"\\x([01][0-9a-f]|7f|[89a-f][0-9a-f])")
# What desktops, file servers and notebooks leave behind, in lower case; and whatever starts with a dot.
SYSTEM_NAMES = frozenset(
    {
        *("__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),
        *("$recycle.bin", "recycler", "system volume information", "lost+found", "found.000"),
        *("@eadir", "@__thumb", "@recycle", "@recently-snapshot", "@tmp", "@sharebin"),
        *("#recycle", "#snapshot"),
    }
)


@dataclass(frozen=True)
class Listing:
    """The files below a folder, ordered by path.

    Attributes:
        files: relative to the folder, with parts joined by `/`; a folder that cannot be listed ends in `/`.
        ignored: hidden and system files and folders, which are not entered.
    """

    files: list[str]
    ignored: list[str]


def list_folder(folder: str | Path) -> Listing:
    """List the files in a folder and below; linked folders are entered, but never inside themselves.

    Raises:
        OSError: the folder itself cannot be listed.
        UserError: at an address, the same, or there is no file.
    """
    folder, ignored = os.fspath(folder), []
    if is_remote(folder):
        files = remote_files.find(folder)
        ignored = [file for file in files if is_system_file(file)]
        return Listing([file for file in files if not is_system_file(file)], ignored)
    files = _below(folder, "", (os.path.realpath(folder),), ignored)
    return Listing(sorted(files), ignored)


def image_files(folder: str | Path, files: list[str]) -> dict[str, str]:
    """Return the files of a folder that could be images, and why they cannot be decoded, or "".

    Only a file whose suffix does not tell is opened.
    """
    folder = os.fspath(folder)
    reasons = {}
    for file in files:
        reason = refusal_of_file(file, lambda file=file: _head(os.path.join(folder, file)))
        if reason is not None:
            reasons[file] = reason
    return reasons


def is_system_file(path: str) -> bool:
    """Tell whether a path with `/` leads to or through a hidden or system file or folder."""
    return any(_is_system(part) for part in path.split("/"))


def ignored_note(ignored: list[str]) -> str:
    """Return the line that says how many hidden and system files were left out."""
    example = printable(ignored[0])
    return f"note: hidden or system files and folders ignored: {len(ignored)}, such as {example}"


def printable(name: str) -> str:
    """Return a name with control characters, except tabs, and bytes that are not UTF-8 as `\\xNN`."""
    return UNPRINTABLE.sub(lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", name)


def file_path(location: str) -> str:
    """Return the path of the file that a location names, as it is or in the spelling of `printable`."""
    if "\\x" in location and not is_remote(location) and not os.path.lexists(location):
        raw = _ESCAPED.sub(lambda match: bytes.fromhex(match[1]).decode("utf-8", "surrogateescape"), location)
        if os.path.lexists(raw):
            return raw
    return location


def file_size(location: str) -> int:
    """Return the size of a file in bytes; raises `OSError`."""
    is_address = is_remote(location)
    return remote_files.RemoteFile(location).size if is_address else os.path.getsize(file_path(location))


def read_head(location: str, size: int) -> bytes:
    """Return the first bytes of a file; raises `OSError`."""
    if is_remote(location):
        return remote_files.read_start(location, size)
    with open(file_path(location), "rb") as file:
        return file.read(size)


def split_location(location: str) -> tuple[str, str | None]:
    """Return the archive of a location and the member in it; a single file and None."""
    if ARCHIVE_SEPARATOR not in location:
        return location, None
    if ends := [match.end() for match in _ARCHIVE_END.finditer(location)]:
        # Of several, the file: a folder's name, or a member's, may look like that of an archive.
        known = len(ends) > 1 and not is_remote(location)
        end = next((end for end in ends if known and os.path.isfile(location[:end])), ends[0])
        return location[:end], location[end + len(ARCHIVE_SEPARATOR) :]
    if is_remote(location) or os.path.exists(location):  # an ordinary file whose path has two colons
        return location, None
    archive, _, member = location.partition(ARCHIVE_SEPARATOR)
    return archive, member


def absolute(path: str | Path) -> str:
    """Return an absolute path without `..`, which after a linked folder means the parent of its target.

    An address is returned as it is.
    """
    path = os.fspath(path)
    if is_remote(path):
        return path
    parts = path.split(os.sep)
    if os.pardir not in parts:
        return os.path.abspath(path)
    end = len(parts) - parts[::-1].index(os.pardir)
    return os.path.normpath(os.path.join(_resolved(os.sep.join(parts[:end])), *parts[end:]))


@lru_cache(maxsize=1024)
def _resolved(path: str) -> str:
    folded = os.path.abspath(path)
    real = os.path.realpath(path)
    return folded if os.path.realpath(folded) == real else real


def _is_system(name: str) -> bool:
    is_hidden = name.startswith(".") and name not in (os.curdir, os.pardir)
    return is_hidden or name.lower() in SYSTEM_NAMES or "@syno" in name.lower()


def _below(folder: str, prefix: str, ancestors: tuple[str, ...], ignored: list[str]) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        if not prefix:
            raise
        yield prefix
        return
    for entry in entries:
        path = prefix + entry.name
        if _is_system(entry.name):
            ignored.append(path)
        elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            real = (
                os.path.realpath(entry.path) if entry.is_symlink() else f"{ancestors[-1]}{os.sep}{entry.name}"
            )
            if real not in ancestors:
                yield from _below(entry.path, f"{path}/", (*ancestors, real), ignored)
        else:
            yield path


def _head(path: str) -> bytes | None:
    """Return the first bytes of a file; None if it cannot be read, nothing for a pipe or a dangling link."""
    try:
        if not is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
            return b""
        return read_head(path, HEAD_BYTES)
    except OSError as error:
        return b"" if error.errno in (errno.ENOENT, errno.ELOOP) else None
