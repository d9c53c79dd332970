"""What is inside a zip or tar archive or a folder of images, and which of the images can be read.

Archives are untrusted input. Nothing is ever unpacked; even so, an archive is refused that has a member whose
name leads out of it or is no text, that is a link or a device, or that is encrypted.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from data_prep.writing.parallel import map_images
from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.images import reading as image_io
from featdistill.images.archive_index import INVALID_IN_NAMES
from featdistill.images.archives import ARCHIVE_SEPARATOR, ARCHIVE_SUFFIXES, Archive, ArchiveError
from featdistill.records import manifest


@dataclass(frozen=True)
class Container:
    """A zip or tar archive or a folder.

    Attributes:
        path: absolute path of the archive or folder.
        is_archive: whether it is an archive.
        files: the names of its files, relative to it, parts joined by `/`; no hidden files.
    """

    path: str
    is_archive: bool
    files: tuple[str, ...]

    def location(self, file: str) -> str:
        """Return what a manifest calls a file of this container."""
        return f"{self.path}{ARCHIVE_SEPARATOR if self.is_archive else os.sep}{file}"

    def images(self) -> list[str]:
        """Return the files that are images, by their suffix."""
        return [file for file in self.files if file.lower().endswith(image_io.IMAGE_SUFFIXES)]

    def named(self, name: str) -> list[str]:
        """Return the files of this name, in whatever folder inside."""
        return [file for file in self.files if file.rpartition("/")[2] == name]


@dataclass(frozen=True)
class Tree:
    """The zip and tar archives, CSV files and folders below a root, as paths without repetition by links."""

    root: str
    files: list[str]
    folders: list[str]

    def relative(self, path: str) -> str:
        return os.path.relpath(path, self.root)


def search(root: str | Path, depth: int) -> Tree:
    """Look for archives, CSV files and folders in `root` and `depth` levels of folders below it."""
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
    """List a zip archive or a plain tar; the list of a tar is kept beside it.

    Raises:
        UserError: it is damaged or compressed as a whole, or has a member that is encrypted, is a link or a
            device, leads out of the archive or has control characters in its name.
    """
    path = _usable(path)
    try:
        index = Archive(path).index
    except ArchiveError as error:
        # What is compressed as a whole is not damaged: its message says what to do.
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
    """List a folder and all folders below it; links to folders are followed, hidden files are left out.

    Raises:
        UserError: a folder cannot be listed, or a file's name cannot stand in a manifest.
    """
    path = _usable(path)
    try:
        files = tuple(_files_below(path, "", (os.path.realpath(path),)))
    except OSError as error:
        raise UserError(f"cannot list {error.filename or path}: {error.strerror or error}") from error
    for file in files:
        # On Linux a backslash or a colon in a file's name is nothing but a character.
        if ARCHIVE_SEPARATOR in file or INVALID_IN_NAMES.search(file):
            raise UserError(f"{path}: the name {file!r} cannot stand in a manifest; rename it")
    return Container(path, False, files)


def unreadable_images(locations: list[str], workers: int) -> dict[str, str]:
    """Decode every image.

    Args:
        locations: what a manifest calls the images.
        workers: number of processes; with 1, or for a few images, the work is done in this one.

    Returns:
        Why it could not be read, for each location that could not.

    Raises:
        UserError: `workers` is below 1, or a process died.
    """
    found = map_images(_why_unreadable, locations, workers, "verify")
    return {location: fault for location, fault in zip(locations, found, strict=True) if fault}


def write_readable(frame: pd.DataFrame, path: str | Path, *, verify: bool, workers: int) -> int:
    """Write a manifest; where asked to, without the images that cannot be read.

    Those are listed in `<manifest>.errors.csv` (columns name, reason); a list of before is removed.

    Returns:
        The number of images that could not be read; 0 without `verify`.
    """
    path = Path(path)
    faults = unreadable_images(frame["image"].tolist(), workers) if verify else {}
    broken = frame["image"].isin(list(faults))
    manifest.write_manifest(frame[~broken], path)
    errors_path = path.with_suffix(".errors.csv")
    if not faults:
        errors_path.unlink(missing_ok=True)
        return 0
    errors = [
        (name, faults[image])
        for name, image in zip(frame["name"], frame["image"], strict=True)
        if image in faults
    ]
    atomic.write_text(errors_path, atomic.csv_text(("name", "reason"), errors))
    print(f"{len(errors)} unreadable images are left out of {path}; see {errors_path}")
    return len(errors)


def _why_unreadable(location: str) -> str:
    try:
        image_io.read_image(location)
    except image_io.BrokenImage as error:
        return str(error)
    return ""


def _usable(path: str | Path) -> str:
    path = os.path.abspath(path)
    if ARCHIVE_SEPARATOR in path:
        raise UserError(f"{path}: a path must not hold '{ARCHIVE_SEPARATOR}'; rename it")
    return path


def _is_hidden(file: str) -> bool:
    """Tell what a desktop leaves in an archive (`.DS_Store`, `__MACOSX/..`) from what belongs to the data."""
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
