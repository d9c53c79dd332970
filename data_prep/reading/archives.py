"""The files in a zip or tar archive or a folder of images.

Archives are untrusted input. Nothing is ever unpacked; even so, an archive is refused if a member's name
leads out of it or is not text, or if a member is a link, a device or encrypted.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from featdistill.command_line import UserError
from featdistill.images.archive_index import INVALID_IN_NAMES
from featdistill.images.archives import ARCHIVE_SEPARATOR, ARCHIVE_SUFFIXES, Archive, ArchiveError
from featdistill.images.formats import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Container:
    """A zip or tar archive or a folder."""

    path: str  # absolute
    is_archive: bool
    files: tuple[str, ...]  # relative to it, with parts joined by `/`; hidden files are left out

    def location(self, file: str) -> str:
        """Return what a manifest calls a file of this container."""
        return f"{self.path}{ARCHIVE_SEPARATOR if self.is_archive else os.sep}{file}"

    def images(self) -> list[str]:
        """Return the files with the suffix of an image."""
        return [file for file in self.files if file.lower().endswith(IMAGE_SUFFIXES)]


@dataclass(frozen=True)
class Tree:
    """Paths of the zip and tar archives, CSV files and folders below a root; linked ones once."""

    root: str
    files: list[str]
    folders: list[str]

    def relative(self, path: str) -> str:
        return os.path.relpath(path, self.root)


def search(root: str | Path, depth: int) -> Tree:
    """Find archives, CSV files and folders in `root` and in `depth` levels of folders below it."""
    root = os.path.abspath(root)
    files, folders = {}, {}
    for folder, inside, names in os.walk(root, followlinks=True):
        relative = os.path.relpath(folder, root)
        level = 0 if relative == os.curdir else relative.count(os.sep) + 1
        inside[:] = sorted(name for name in inside if not name.startswith(".") and level < depth)
        if level:
            folders.setdefault(os.path.realpath(folder), folder)
        for name in sorted(names):
            if name.endswith((*ARCHIVE_SUFFIXES, ".csv")):
                path = os.path.join(folder, name)
                files.setdefault(os.path.realpath(path), path)
    return Tree(root, list(files.values()), list(folders.values()))


def open_archive(path: str | Path) -> Container:
    """List a zip archive or an uncompressed tar; the index of a tar is stored next to it.

    Raises:
        UserError: it is damaged, compressed as a whole, or has a member that is a risk; see above.
    """
    path = _usable(path)
    try:
        index = Archive(path).index
    except ArchiveError as error:
        # An archive that is compressed as a whole is not damaged; its message says what to do.
        advice = "" if "decompress" in str(error) else "; download it again"
        raise UserError(f"{error}{advice}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if index.damage:
        raise UserError(f"{path}: {index.damage}; download it again")
    members = list(index)
    for member in members:
        if member.fault:
            raise UserError(f"{path}: member {member.name!r} {member.fault}; do not use this archive")
    return Container(path, True, tuple(member.name for member in members if not _is_hidden(member.name)))


def open_folder(path: str | Path) -> Container:
    """List the files in a folder and below; linked folders are followed, hidden files are left out."""
    path = _usable(path)
    try:
        files = tuple(_files_below(path, "", (os.path.realpath(path),)))
    except OSError as error:
        raise UserError(f"cannot list {error.filename or path}: {error.strerror or error}") from error
    for file in files:
        # Backslashes and colons are ordinary characters in file names on Linux.
        if ARCHIVE_SEPARATOR in file or INVALID_IN_NAMES.search(file):
            raise UserError(f"{path}: the name {file!r} cannot be used in a manifest; rename it")
    return Container(path, False, files)


def _usable(path: str | Path) -> str:
    path = os.path.abspath(path)
    if ARCHIVE_SEPARATOR in path:
        raise UserError(f"{path}: a path must not contain '{ARCHIVE_SEPARATOR}'; rename it")
    return path


def _is_hidden(file: str) -> bool:
    """Tell whether a member was left by a desktop (`.DS_Store`, `__MACOSX/..`) and is not data."""
    return file.startswith((".", "__MACOSX/")) or "/." in file


def _files_below(folder: str, prefix: str, ancestors: tuple[str, ...]) -> Iterator[str]:
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield prefix + entry.name
            continue
        real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(ancestors[-1], entry.name)
        if real not in ancestors:
            yield from _files_below(entry.path, f"{prefix}{entry.name}/", (*ancestors, real))
