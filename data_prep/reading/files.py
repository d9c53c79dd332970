"""The images below a root, in folders and archives, and what the names of their folders say.

Archives are read in place. One counts as a folder of its name without suffix, so that `Midjourney.zip` and a
folder `Midjourney` with the same files give the same names and labels. A source reads labels, generators and
sets from whole names of folders, in any case, of a fixed list; the folders above the root say nothing.
"""

import itertools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd

from data_prep.reading import archives
from featdistill.command_line import UserError
from featdistill.images import reading as image_io
from featdistill.images.archives import ARCHIVE_SUFFIXES, COMPRESSED_TAR_SUFFIXES

# Cut in pieces, or compressed so that no member can be read without all that goes before it.
_NOT_IN_PLACE = re.compile(r"\.(7z|rar|(zip|tar|7z)\.\d+)$", re.IGNORECASE)
Value = TypeVar("Value")


@dataclass(frozen=True)
class ImageFile:
    """An image of a tree of folders and archives.

    Attributes:
        location: what a manifest calls it.
        path: its path below the root, parts joined by `/`; an archive is a folder of its name.
    """

    location: str
    path: str

    @property
    def folders(self) -> tuple[str, ...]:
        return tuple(self.path.split("/")[:-1])

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0] or "."

    @property
    def stem(self) -> str:
        return image_io.without_extension(self.path.rpartition("/")[2])


def find_images(root: str | Path) -> list[ImageFile]:
    """List the images below a root, in folders and in zip and tar archives, ordered by path.

    Where an archive and a folder of its name lie side by side, the archive is used and the folder left out.

    Raises:
        UserError: there are no images, an archive is damaged, hostile or one part of several, or two images
            have one path.
    """
    root = os.path.abspath(root)
    if os.path.isfile(root):
        if not _is_archive(root):
            raise UserError(f"{root} is neither a folder nor a {' or '.join(ARCHIVE_SUFFIXES)} archive")
        found = _archive_images(root, "")
    else:
        found = _tree_images(root)
    if not found:
        raise UserError(f"{root} holds no images; --root is the folder with the data as downloaded")
    found.sort(key=lambda file: file.path)
    for former, file in itertools.pairwise(found):
        if former.path == file.path:
            raise UserError(f"{former.location} and {file.location} are the same image; keep one of them")
    return found


def one_on_path(file: ImageFile, known: Mapping[str, Value], what: str) -> tuple[int, Value]:
    """Return the place of the first folder on a path that is known by its whole name, in any case.

    Args:
        known: values by case-folded names of folders.
        what: what these folders are, for the error.

    Returns:
        Its place on `file.folders` and its value.

    Raises:
        UserError: no folder on the path is known, or two are and have different values.
    """
    places = [(place, name.casefold()) for place, name in enumerate(file.folders) if name.casefold() in known]
    if not places:
        path = f"folder '{file.folder}' has images, but no folder on its path, from --root on,"
        raise UserError(f"{path} is {what}: {', '.join(known)}")
    place, name = places[0]
    for other_place, other in places[1:]:
        if known[other] != known[name]:
            pair = f"'{file.folders[place]}' and '{file.folders[other_place]}'"
            raise UserError(f"folder '{file.folder}' lies under {pair}, which disagree: each is {what}")
    return place, known[name]


def nothing_else(file: ImageFile, known: Iterable[str], start: int = 0) -> None:
    """Check that all folders on a path, from a place on, are known by their whole name, in any case.

    Raises:
        UserError: one is not; it is named.
    """
    known = set(known)
    for name in file.folders[start:]:
        if name.casefold() not in known:
            raise UserError(f"folder '{file.folder}' has images, but '{name}' is no folder of this data set")


def set_class_label(
    file: ImageFile, sets: Mapping[str, str], labels: Mapping[str, int]
) -> tuple[str, str, int]:
    """Return what `<set>/<label>` or `<set>/<class>/<label>` says of an image; the class may be empty.

    Raises:
        UserError: the folders are not laid out so.
    """
    place, name = one_on_path(file, sets, "a set")
    label_place, label = one_on_path(file, labels, "a label")
    classes = [folder for folder in file.folders[place:label_place] if folder.casefold() not in sets]
    if label_place < place or len(classes) > 1:
        raise UserError(f"folder '{file.folder}' is not laid out as <set>/<label> or <set>/<class>/<label>")
    nothing_else(file, labels, label_place)
    return name, "".join(classes), label


def names_of(paths: list[str]) -> list[str]:
    """Return the files' names where they are unique, and the whole paths of the others."""
    names = pd.Series([path.rpartition("/")[2] for path in paths], dtype="object")
    return names.where(~names.duplicated(keep=False), pd.Series(paths, dtype="object")).tolist()


def columns_of(files: list[ImageFile]) -> dict[str, list]:
    """Return the columns that any image file gives: image, name, and group, its stem."""
    return {
        "image": [file.location for file in files],
        "name": names_of([file.path for file in files]),
        "group": [file.stem for file in files],
    }


def _is_archive(path: str) -> bool:
    return path.lower().endswith(ARCHIVE_SUFFIXES)


def _cannot_be_read_in_place(path: str) -> bool:
    return path.lower().endswith(COMPRESSED_TAR_SUFFIXES) or _NOT_IN_PLACE.search(path) is not None


def _is_part(path: str) -> bool:
    """Tell the last part of a zip archive in several parts, which lies beside the first, `.z01`."""
    stem = os.path.splitext(path)[0]
    return os.path.exists(f"{stem}.z01") or os.path.exists(f"{stem}.Z01")


def _archive_images(path: str, prefix: str) -> list[ImageFile]:
    """List an archive's images; a folder in it that holds all of them and has its name is not repeated."""
    if _is_part(path):
        whole = f"zip -s 0 {os.path.basename(path)} --out whole.zip"
        raise UserError(f"{path} is one part of several and cannot be read in place; join them ({whole})")
    container = archives.open_archive(path)
    for file in container.files:
        if _is_archive(file) or _cannot_be_read_in_place(file):
            print(f"note: {container.location(file)}, an archive in one, is not looked into; unpack it")
    images = container.images()
    inner = f"{prefix.rstrip('/').rpartition('/')[2]}/"
    if all(file.startswith(inner) for file in images):
        prefix = prefix.removesuffix(inner)
    return [ImageFile(container.location(file), prefix + file.removeprefix("./")) for file in images]


def _tree_images(root: str) -> list[ImageFile]:
    tree = archives.open_folder(root)
    loose = {file: ImageFile(tree.location(file), file) for file in tree.images()}
    found = []
    for file in tree.files:
        if _cannot_be_read_in_place(file):
            print(f"note: {file} cannot be read in place and is not looked into; unpack it")
        if not _is_archive(file):
            continue
        prefix = f"{os.path.splitext(file)[0]}/"
        is_unpacked = os.path.isdir(tree.location(prefix))
        unpacked = [path for path in loose if path.startswith(prefix)] if is_unpacked else []
        if unpacked and _is_part(tree.location(file)):
            print(f"note: {file}, one part of several, is left out: the folder {prefix} is used")
            continue
        images = _archive_images(tree.location(file), prefix)
        if images and unpacked:
            print(f"note: the folder {prefix} is left out: the archive {file} is used")
            for path in unpacked:
                del loose[path]
        found += images
    return found + list(loose.values())
