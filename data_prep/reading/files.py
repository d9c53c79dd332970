"""The images below a root, in folders and archives, and what the names of their folders tell.

Archives are read in place. An archive counts as a folder with its name without suffix, so `Midjourney.zip`
and a folder `Midjourney` with the same files give the same names and labels. Labels, generators and sets come
from whole folder names, in any case, in a fixed list; folders above the root do not count.
"""

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd

from data_prep.reading.archives import (
    Container,
    cannot_be_read_in_place,
    is_archive,
    note_ignored,
    open_archive,
    open_folder,
)
from featdistill.command_line import UserError
from featdistill.images.archives import ARCHIVE_SUFFIXES
from featdistill.images.formats import without_extension
from featdistill.images.listing import absolute

_log = logging.getLogger(__name__)
FAULT = "fault"
Value = TypeVar("Value")


@dataclass(frozen=True)
class ImageFile:
    """An image in a tree of folders and archives."""

    location: str  # for the manifest's column `image`
    path: str  # below the root, with parts joined by `/`; an archive is a folder with its name
    fault: str = ""  # why it cannot be used

    @property
    def folders(self) -> tuple[str, ...]:
        return tuple(self.path.split("/")[:-1])

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0] or "."

    @property
    def stem(self) -> str:
        return without_extension(self.path.rpartition("/")[2])


def find_images(root: str | Path) -> list[ImageFile]:
    """List the images below a root, in folders and in zip and tar archives, ordered by path.

    Where an archive is next to a folder with its name, the archive is used and the folder is not. Images that
    cannot be used are listed with their fault.

    Raises:
        UserError: there are no images, an archive is damaged or one part of several, or two images have the
            same path.
    """
    root, opened = absolute(root), []
    if os.path.isfile(root):
        if not is_archive(root):
            raise UserError(f"{root} is neither a folder nor a {' or '.join(ARCHIVE_SUFFIXES)} archive")
        images = _archive_images(root, "", opened)
    else:
        images = _tree_images(root, opened)
    note_ignored(opened)
    if not images:
        raise UserError(f"{root} holds no images; --root is the folder with the data as downloaded")
    images.sort(key=lambda file: file.path)
    for previous, file in itertools.pairwise(images):
        if previous.path == file.path:
            raise UserError(f"{previous.location} and {file.location} are the same image; keep one of them")
    return images


def one_on_path(file: ImageFile, known: Mapping[str, Value], what: str) -> tuple[int, Value]:
    """Return position and value of the first folder on a path whose whole name is known, in any case.

    Args:
        known: values by case-folded folder name.
        what: what these folders are, for the error.

    Raises:
        UserError: no folder on the path is known, or two are and have different values.
    """
    names = enumerate(map(str.casefold, file.folders))
    matches = [(position, known[name]) for position, name in names if name in known]
    if not matches:
        start = f"folder '{file.folder}' has images, but no folder on its path, from --root on,"
        raise UserError(f"{start} is {what}: {', '.join(known)}")
    position, value = matches[0]
    for other, other_value in matches[1:]:
        if other_value != value:
            pair = f"'{file.folders[position]}' and '{file.folders[other]}'"
            raise UserError(f"folder '{file.folder}' is below {pair}, which disagree: each is {what}")
    return position, value


def nothing_else(file: ImageFile, known: Iterable[str], start: int = 0) -> None:
    """Raise a `UserError` unless all folders from a position on are known by whole name, in any case."""
    known = set(known)
    for name in file.folders[start:]:
        if name.casefold() not in known:
            raise UserError(f"folder '{file.folder}' has images, but this data set has no folder '{name}'")


def set_class_label(
    file: ImageFile, sets: Mapping[str, str], labels: Mapping[str, int]
) -> tuple[str, str, int]:
    """Return set, class (may be empty) and label of an image in `<set>/<label>` or `<set>/<class>/<label>`.

    Raises:
        UserError: the folders have another layout.
    """
    position, name = one_on_path(file, sets, "a set")
    label_position, label = one_on_path(file, labels, "a label")
    classes = [folder for folder in file.folders[position:label_position] if folder.casefold() not in sets]
    if label_position < position or len(classes) > 1:
        raise UserError(f"folder '{file.folder}' is neither <set>/<label> nor <set>/<class>/<label>")
    nothing_else(file, labels, label_position)
    return name, "".join(classes), label


def read_rows(files: list[ImageFile], row: Callable[[ImageFile], dict[str, object]]) -> dict[str, list]:
    """Return the columns of a manifest: image, name, group (the file's stem), and the cells from `row`.

    Names are those of the files if these are unique, and otherwise paths. If some files cannot be used, a
    column `fault` says why, and their other cells are empty; see `manifests.take_left_out`.

    Raises:
        UserError: none can be used.
    """
    cells = [{} if file.fault else row(file) for file in files]
    columns = next((each for each, file in zip(cells, files, strict=True) if not file.fault), None)
    if columns is None:
        raise UserError(f"no image can be used: {files[0].location}: {files[0].fault}")
    names = pd.Series([file.path.rpartition("/")[2] for file in files], dtype="object")
    paths = pd.Series([file.path for file in files], dtype="object")
    return {
        "image": [file.location for file in files],
        "name": names.where(~names.duplicated(keep=False), paths).tolist(),
        "group": [file.stem for file in files],
        **{column: [each.get(column) for each in cells] for column in columns},
        **({FAULT: [file.fault for file in files]} if any(file.fault for file in files) else {}),
    }


def _is_part(path: str) -> bool:
    """Tell whether this is the last part of a split zip archive: the first one, `.z01`, is next to it."""
    stem = os.path.splitext(path)[0]
    return os.path.exists(f"{stem}.z01") or os.path.exists(f"{stem}.Z01")


def _archive_images(path: str, prefix: str, opened: list[Container]) -> list[ImageFile]:
    """List an archive's images; a top folder in it with the archive's own name is not repeated."""
    if _is_part(path):
        join = f"zip -s 0 {os.path.basename(path)} --out whole.zip"
        raise UserError(f"{path} is one part of several and cannot be read in place; join them ({join})")
    container = open_archive(path)
    opened.append(container)
    for file in container.files:
        if is_archive(file) or cannot_be_read_in_place(file):
            _log.info(f"note: {container.location(file)}, an archive in an archive, is ignored; unpack it")
    images = {**dict.fromkeys(container.images, ""), **container.left_out}
    inner = f"{prefix.rstrip('/').rpartition('/')[2]}/"
    if all(file.startswith(inner) for file in images):
        prefix = prefix.removesuffix(inner)
    return [ImageFile(container.location(file), prefix + file, fault) for file, fault in images.items()]


def folder_images(tree: Container) -> dict[str, ImageFile]:
    """Return the images in a folder, by path, those that cannot be used with their fault."""
    images = {**dict.fromkeys(tree.images, ""), **tree.left_out}
    return {file: ImageFile(tree.location(file), file, fault) for file, fault in images.items()}


def _tree_images(root: str, opened: list[Container]) -> list[ImageFile]:
    tree = open_folder(root)
    opened.append(tree)
    loose = folder_images(tree)
    images = []
    for file in tree.files:
        if cannot_be_read_in_place(file):
            _log.info(f"note: {file} cannot be read in place and is ignored; unpack it")
        if not is_archive(file):
            continue
        prefix = f"{os.path.splitext(file)[0]}/"
        is_unpacked = os.path.isdir(tree.location(prefix))
        unpacked = [path for path in loose if path.startswith(prefix)] if is_unpacked else []
        if unpacked and _is_part(tree.location(file)):
            _log.info(f"note: {file}, one part of several, is ignored: the folder {prefix} is used")
            continue
        members = _archive_images(tree.location(file), prefix, opened)
        if members and unpacked:
            _log.info(f"note: the folder {prefix} is ignored: the archive {file} is used")
            for path in unpacked:
                del loose[path]
        images += members
    return images + list(loose.values())
