"""The files in a zip or tar archive or a folder of images.

Archives are untrusted input and never unpacked. A member that is a link, a device or encrypted, or whose name
leads out of the archive or is not text, is left out with a reason; the others are used.
"""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from featdistill.command_line import UserError, counted
from featdistill.images.archives import ARCHIVE_SUFFIXES, COMPRESSED_TAR_SUFFIXES, Archive, ArchiveError
from featdistill.images.formats import refusal_of_file
from featdistill.images.listing import (
    ARCHIVE_SEPARATOR,
    absolute,
    ignored_note,
    image_files,
    is_system_file,
    list_folder,
    printable,
)
from featdistill.remote_files import is_remote

_log = logging.getLogger(__name__)
# Split into parts, or compressed so that a member cannot be read without everything before it.
_NOT_IN_PLACE = re.compile(r"\.(7z|rar|(zip|tar|7z)\.\d+)$", re.IGNORECASE)
# What browsers and desktops add to the name of a second copy: `shard_1 (1).zip`.
_COPY = re.compile(r"( ?\(\d+\)| ?- ?copy| copy( \d+)?)+$", re.IGNORECASE)


@dataclass(frozen=True)
class Container:
    """A zip or tar archive or a folder; files are relative to it, with parts joined by `/`."""

    path: str  # absolute
    is_archive: bool
    files: tuple[str, ...]  # that can be read, without hidden and system files
    images: tuple[str, ...]  # those of them that are images, as far as suffix and first bytes tell
    left_out: dict[str, str] = field(default_factory=dict)  # images that cannot be used, and why
    ignored: tuple[str, ...] = ()  # hidden and system files and folders
    unusable: tuple[str, ...] = ()  # links, devices and the like that are no images, each with its fault

    def location(self, file: str) -> str:
        """Return what a manifest calls a file of this container."""
        separator = "/" if is_remote(self.path) else os.sep
        return f"{self.path.rstrip(separator)}{ARCHIVE_SEPARATOR if self.is_archive else separator}{file}"


@dataclass(frozen=True)
class Tree:
    """Paths of the archives, CSV files and folders below a root; linked ones once."""

    root: str
    files: list[str]
    folders: list[str]
    ignored: list[str]  # hidden and system files and folders

    def relative(self, path: str) -> str:
        return os.path.relpath(path, self.root)


def search(root: str | Path, depth: int) -> Tree:
    """Find archives, CSV files and folders in `root` and in `depth` levels of folders below it."""
    root = absolute(root)
    files, folders, ignored = {}, {}, []
    for folder, inside, names in os.walk(root, followlinks=True):
        relative = os.path.relpath(folder, root)
        level = 0 if relative == os.curdir else relative.count(os.sep) + 1
        ignored += [os.path.join(folder, name) for name in (*inside, *names) if is_system_file(name)]
        inside[:] = sorted(name for name in inside if not is_system_file(name) and level < depth)
        if level:
            folders.setdefault(os.path.realpath(folder), folder)
        for name in sorted(names):
            is_table = name.lower().endswith(".csv")
            if not is_system_file(name) and (is_table or is_archive(name) or cannot_be_read_in_place(name)):
                path = os.path.join(folder, name)
                files.setdefault(os.path.realpath(path), path)
    return Tree(root, list(files.values()), list(folders.values()), ignored)


def is_archive(path: str) -> bool:
    return path.lower().endswith(ARCHIVE_SUFFIXES)


def cannot_be_read_in_place(path: str) -> bool:
    return path.lower().endswith(COMPRESSED_TAR_SUFFIXES) or _NOT_IN_PLACE.search(path) is not None


def without_copy_number(name: str) -> str:
    """Return a name without what marks a second copy: `shard_1 (1)` is `shard_1`."""
    return _COPY.sub("", name)


def open_archive(path: str | Path) -> Container:
    """List a zip archive or an uncompressed tar; the index of a tar is stored next to it.

    Raises:
        UserError: it is damaged, compressed as a whole, or none of its images can be used.
    """
    path = absolute(path)
    try:
        archive = Archive(path)
    except ArchiveError as error:
        # An archive that is compressed as a whole is not damaged; its message says what to do.
        advice = "" if "decompress" in str(error) else "; download it again"
        raise UserError(f"{error}{advice}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if archive.index.damage:
        raise UserError(f"{path}: {archive.index.damage}; download it again")
    files, images, ignored, unusable = [], [], [], []
    left_out: dict[str, str] = {}
    for name, fault, *_ in archive.index:
        if is_system_file(name):
            ignored.append(name)
            continue
        reason = refusal_of_file(name, lambda name=name, fault=fault: b"" if fault else archive.head(name))
        if fault and reason is None:
            unusable.append(f"{printable(name)} {fault}")
        elif fault or reason:
            left_out[name] = (fault and f"the member {fault}") or reason
        else:
            files.append(name)
            images += [name] if reason == "" else []
    return Container(
        path, True, tuple(files), tuple(images), left_out, ignored=tuple(ignored), unusable=tuple(unusable)
    )


def open_folder(path: str | Path) -> Container:
    """List the files in a folder and below; see `featdistill.images.listing`."""
    path = absolute(path)
    try:
        listing = list_folder(path)
        for file in listing.files:
            if file.endswith("/"):
                os.listdir(os.path.join(path, file))
    except OSError as error:
        raise UserError(f"cannot list {error.filename or path}: {error.strerror or error}") from error
    reasons = image_files(path, listing.files)
    images = tuple(file for file, reason in reasons.items() if not reason)
    left_out = {file: reason for file, reason in reasons.items() if reason}
    files = tuple(file for file in listing.files if file not in left_out)
    return Container(path, False, files, images, left_out, ignored=tuple(listing.ignored))


def note_ignored(containers: Sequence[Container], outside: Sequence[str] = ()) -> None:
    """Log once, with counts, which files in and outside of containers are not data."""
    if ignored := [*outside, *(file for container in containers for file in container.ignored)]:
        _log.info(ignored_note(ignored))
    for container in containers:
        if container.unusable:
            count, first = len(container.unusable), container.unusable[0]
            _log.info(f"note: {container.path}: {counted(count, 'member')} left out, such as {first}")


def note_archives(files: Sequence[str], why: str) -> None:
    """Say which of some files are archives that are not looked into."""
    if found := [file for file in files if is_archive(file) or cannot_be_read_in_place(file)]:
        names = ", ".join(map(printable, found[:3])) + (", .." if len(found) > 3 else "")
        _log.info(f"note: {counted(len(found), 'archive')} ignored ({names}): {why}")
