"""Decoded and resized images, kept without loss in memory-mapped files: made once, read in every epoch.

Decoding and resizing are most of a training image's work where distortions come after the resizing. The cache
holds each image as it is before its crop, so that an item made from the cache equals one made without it, bit
for bit.

A cache is a folder named by the hash of all that decides its bytes, with a `cache.json` that says what that
is, and a file for every 512 rows: the images one after the other, (h, w, 3) uint8 each; a JSON object with
their `sizes` and the reasons of those that are `broken`; its length as 8 bytes. Such a file is there whole or
not at all, so that a killed run continues where it was, and several runs may make a cache at the same time.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from featdistill.command_line import UserError, progress
from featdistill.data.loading import load_image
from featdistill.data.preprocessing import Preprocessing, before_crop
from featdistill.images.archives import ARCHIVE_SEPARATOR
from featdistill.images.equalization import Equalization
from featdistill.images.reading import BrokenImage
from featdistill.process_setup import one_thread

_FORMAT = 1
_ROWS_A_FILE = 512
_LENGTH_BYTES = 8
# Images whose size is looked at to tell how much space all of them take.
_SAMPLE = 16


class ImageCache:
    """The images of a finished cache, by the number of their row.

    Args:
        folder: where the cache lies, as `build_cache` made it.
        rows: how many images it has.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = folder
        self.sizes = np.zeros((rows, 2), np.int32)
        self.starts = np.zeros(rows, np.int64)
        self.broken: dict[int, str] = {}
        self._files: dict[int, np.ndarray] = {}
        for first in range(0, rows, _ROWS_A_FILE):
            index = _read_index(_file(folder, first // _ROWS_A_FILE))
            if index is None:
                raise FileNotFoundError(f"{folder} is no whole cache of {rows} images")
            sizes = np.array(index["sizes"], np.int64)
            self.sizes[first : first + len(sizes)] = sizes
            ends = np.cumsum(3 * sizes.prod(axis=1))
            self.starts[first + 1 : first + len(sizes)] = ends[:-1]
            self.broken |= {first + int(place): reason for place, reason in index["broken"].items()}

    def __len__(self) -> int:
        return len(self.sizes)

    def __getstate__(self) -> dict[str, Any]:
        # What is mapped would be sent to another process as so many bytes.
        return self.__dict__ | {"_files": {}}

    def read(self, row: int) -> np.ndarray:
        """Return an image as `before_crop` left it: (h, w, 3) uint8, which cannot be written to.

        Raises:
            BrokenImage: it could not be read when the cache was made.
        """
        if row in self.broken:
            raise BrokenImage(self.broken[row])
        number = row // _ROWS_A_FILE
        if number not in self._files:
            self._files[number] = np.asarray(np.memmap(_file(self.folder, number), np.uint8, "r"))
        height, width = self.sizes[row].tolist()
        pixels = self._files[number][self.starts[row] :][: 3 * height * width]
        return pixels.reshape(height, width, 3)


def build_cache(
    folder: str | Path,
    rows: pd.DataFrame,
    preprocessing: Preprocessing,
    *,
    equalization: Equalization | None = None,
    max_side_px: int | None = None,
    key_parts: Sequence[str] = (),
    workers: int = 0,
) -> ImageCache:
    """Make what is missing of the cache of these images, and open it.

    An image that could not be read before is tried again each time. A loose file that was replaced by another
    of its name is not noticed where the manifest stays the same; an archive is.

    Args:
        folder: the caches' folder; the cache itself is a folder in it.
        rows: of a manifest.
        preprocessing: whose size and way of resizing the images are kept in.
        equalization, max_side_px: what comes before the resizing, see `load_image`.
        key_parts: what else decides the images, such as the hashes of the manifests. With other ones,
            another cache is made.
        workers: number of processes; 0: this one.

    Raises:
        UserError: there is not enough space, nothing can be written there, or a process died.
    """
    made_of = {
        "format": _FORMAT,
        "rows": len(rows),
        "images": _hash_of_images(rows),
        "size_px": preprocessing.size,
        "resize": preprocessing.resize,
        "max_side_px": max_side_px,
        "equalisation": equalization.as_json() if equalization else None,
        "key": list(key_parts),
    }
    target = Path(folder) / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    files = _Files(target, rows, preprocessing, equalization, max_side_px)
    missing = [number for number in range(len(files)) if files.is_missing(number)]
    if missing:
        try:
            target.mkdir(parents=True, exist_ok=True)
            files.check_space(missing)
            with _replace(target / "cache.json") as file:
                file.write(json.dumps(made_of, indent=2).encode())
            _make(files, missing, workers)
        except OSError as error:
            raise UserError(f"cannot write the cache {target}: {error.strerror or error}") from error
        for left in target.glob(".*.part"):
            left.unlink(missing_ok=True)
    return ImageCache(target, len(rows))


class _Files(Dataset):
    """The files of a cache as items that are made when they are asked for."""

    def __init__(
        self,
        folder: Path,
        rows: pd.DataFrame,
        preprocessing: Preprocessing,
        equalization: Equalization | None,
        max_side_px: int | None,
    ) -> None:
        self.folder, self.key = folder, preprocessing.key
        self.images, self.names = rows["image"].tolist(), rows["name"].tolist()
        self.equalization, self.max_side_px = equalization, max_side_px

    def __len__(self) -> int:
        return -(-len(self.images) // _ROWS_A_FILE)

    def __getitem__(self, number: int) -> int | str:
        """Write a file; return how many images it has, or why it cannot be written."""
        sizes, broken = [], {}
        try:
            with _replace(_file(self.folder, number)) as file:
                for place, row in enumerate(self._rows(number)):
                    try:
                        image = np.ascontiguousarray(self.image(row))
                        file.write(image.data)
                        sizes.append(image.shape[:2])
                    except BrokenImage as error:
                        sizes.append((0, 0))
                        broken[place] = str(error)
                index = json.dumps({"sizes": sizes, "broken": broken}).encode()
                file.write(index + len(index).to_bytes(_LENGTH_BYTES, "little"))
        except OSError as error:
            return error.strerror or str(error)
        return len(sizes)

    def image(self, row: int) -> np.ndarray:
        image = load_image(self.images[row], self.names[row], self.equalization, self.max_side_px)
        return before_crop(image, *self.key)

    def is_missing(self, number: int) -> bool:
        """Tell whether a file must be made: it is not there, or an image that was broken is so no more."""
        index = _read_index(_file(self.folder, number))
        return index is None or any(
            self._size(number * _ROWS_A_FILE + int(place)) is not None for place in index["broken"]
        )

    def check_space(self, missing: Sequence[int]) -> None:
        """Refuse to begin what the disk has no room for, by the sizes of some of the images."""
        rows = [row for number in missing for row in self._rows(number)]
        sizes = [self._size(row) or 0 for row in rows[:: -(-len(rows) // _SAMPLE)]]
        needed, free = sum(sizes) / len(sizes) * len(rows), shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"the cache of {len(rows)} images in {self.folder.parent} needs about {needed / 1e9:.1f} GB, "
                f"and {free / 1e9:.1f} GB are free; make room there, or give --cache a folder on another disk"
            )

    def _rows(self, number: int) -> range:
        first = number * _ROWS_A_FILE
        return range(first, min(first + _ROWS_A_FILE, len(self.images)))

    def _size(self, row: int) -> int | None:
        try:
            return self.image(row).nbytes
        except BrokenImage:
            return None


def _make(files: _Files, missing: Sequence[int], workers: int) -> None:
    loader = DataLoader(
        files,
        batch_size=None,
        sampler=missing,
        num_workers=min(workers, len(missing)),
        worker_init_fn=one_thread,
        generator=torch.Generator().manual_seed(0),
    )
    there = len(files.images) - sum(len(files._rows(number)) for number in missing)
    with progress(len(files.images), "cache", initial=there) as bar:
        try:
            for made in loader:
                if isinstance(made, str):
                    raise UserError(f"cannot write the cache {files.folder}: {made}")
                bar.update(made)
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise UserError(
                "a process died while it made the cache; the same command continues, with fewer --workers"
            ) from error


@contextlib.contextmanager
def _replace(path: Path) -> Iterator[BinaryIO]:
    """Like `atomic.replace_file`, for a file that another process, or machine, may be writing, too."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # Where it is gone, another process has finished the whole cache, and cleared up.
        with contextlib.suppress(FileNotFoundError):
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.images"


def _read_index(path: Path) -> dict[str, Any] | None:
    """Return what a file says of its images, or None where it is missing or not whole."""
    try:
        with path.open("rb") as file:
            end = file.seek(-_LENGTH_BYTES, os.SEEK_END)
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            pixels = file.seek(end - length)
            index = json.loads(file.read(length))
    except (OSError, ValueError):
        return None
    return index if pixels == 3 * sum(height * width for height, width in index["sizes"]) else None


def _hash_of_images(rows: pd.DataFrame) -> str:
    """Return a hash of where the images lie and what they are called, and of the state of their archives."""
    locations = rows["image"].tolist()
    archives = sorted(
        {image.partition(ARCHIVE_SEPARATOR)[0] for image in locations if ARCHIVE_SEPARATOR in image}
    )
    states = []
    for archive in archives:
        with contextlib.suppress(OSError):  # its images are broken
            state = os.stat(archive)
            states.append([archive, state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps([locations, rows["name"].tolist(), states]).encode()).hexdigest()
