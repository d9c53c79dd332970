"""Decoded and resized images in memory-mapped files, without loss: made once, read in every epoch.

If distortions come after resizing, decoding and resizing are most of the work on a training image. The cache
holds each image as it is before its crop, so that an item from the cache equals one made without it, bit for
bit.

A cache is a folder named by the hash of all that determines its bytes (listed in `cache.json`), with one file
per 512 rows: the images one after the other, (h, w, 3) uint8 each; a JSON object with their `sizes` and the
errors of the `broken` ones; its length as 8 bytes. Each file is written completely or not at all, so that a
killed run continues, and several runs may make a cache at the same time.
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
from torch.utils.data import Dataset

from featdistill.command_line import UserError, progress
from featdistill.data.loading import Loader, load_image
from featdistill.data.preprocessing import Preprocessing, before_crop
from featdistill.images.equalization import Equalization
from featdistill.images.listing import split_location
from featdistill.images.reading import BrokenImage

_FORMAT = 1
_ROWS_PER_FILE = 512
_LENGTH_BYTES = 8
# Number of images from whose sizes the size of the cache is estimated.
_SAMPLE = 16


class ImageCache:
    """The images of a finished cache, by row number.

    Args:
        folder: of a cache from `build_cache`.
        rows: number of images.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = folder
        self.sizes = np.zeros((rows, 2), np.int32)
        self.starts = np.zeros(rows, np.int64)
        self.broken: dict[int, str] = {}
        self._files: dict[int, np.ndarray] = {}
        for first in range(0, rows, _ROWS_PER_FILE):
            index = _read_index(_file(folder, first // _ROWS_PER_FILE))
            if index is None:
                raise FileNotFoundError(f"{folder} is not a complete cache of {rows} images")
            sizes = np.array(index["sizes"], np.int64)
            self.sizes[first : first + len(sizes)] = sizes
            ends = np.cumsum(3 * sizes.prod(axis=1))
            self.starts[first + 1 : first + len(sizes)] = ends[:-1]
            self.broken |= {first + int(position): reason for position, reason in index["broken"].items()}

    def __len__(self) -> int:
        return len(self.sizes)

    def __getstate__(self) -> dict[str, Any]:
        # Mapped files would be sent to another process as bytes.
        return self.__dict__ | {"_files": {}}

    def read(self, row: int) -> np.ndarray:
        """Return an image after `before_crop`: (h, w, 3) uint8, read-only.

        Raises:
            BrokenImage: it could not be read when the cache was made.
        """
        if row in self.broken:
            raise BrokenImage(self.broken[row])
        number = row // _ROWS_PER_FILE
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
    """Complete the cache of these images, if necessary, and open it.

    Broken images are tried again each time. A changed archive is noticed; an image file that was replaced
    under the same name is not, if the manifest stays the same.

    Args:
        folder: of all caches; each cache is a folder in it.
        rows: of a manifest.
        preprocessing: determines size and resizing.
        equalization, max_side_px: applied before resizing, see `load_image`.
        key_parts: what else determines the images, such as the hashes of the manifests; other values make
            another cache.
        workers: number of processes; 0: this one.

    Raises:
        UserError: there is not enough space, the folder is not writable, or a process died.
    """
    key = {
        "format": _FORMAT,
        "rows": len(rows),
        "images": _hash_of_images(rows),
        "size_px": preprocessing.size,
        "resize": preprocessing.resize,
        "max_side_px": max_side_px,
        "equalisation": equalization.as_json() if equalization else None,
        "key": list(key_parts),
    }
    target = Path(folder) / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    files = _Files(target, rows, preprocessing, equalization, max_side_px)
    missing = [number for number in range(len(files)) if files.is_missing(number)]
    if missing:
        try:
            target.mkdir(parents=True, exist_ok=True)
            files.check_space(missing)
            with _replace(target / "cache.json") as file:
                file.write(json.dumps(key, indent=2).encode())
            _make(files, missing, workers)
        except OSError as error:
            raise UserError(f"cannot write the cache {target}: {error.strerror or error}") from error
        for temporary in target.glob(".*.part"):
            temporary.unlink(missing_ok=True)
    return ImageCache(target, len(rows))


class _Files(Dataset):
    """The files of a cache, as items that are written when they are read."""

    def __init__(
        self,
        folder: Path,
        rows: pd.DataFrame,
        preprocessing: Preprocessing,
        equalization: Equalization | None,
        max_side_px: int | None,
    ) -> None:
        self.folder, self.key = folder, (preprocessing.size, preprocessing.resize)
        self.images, self.names = rows["image"].tolist(), rows["name"].tolist()
        self.equalization, self.max_side_px = equalization, max_side_px

    def __len__(self) -> int:
        return -(-len(self.images) // _ROWS_PER_FILE)

    def __getitem__(self, number: int) -> int | str:
        """Write a file; return the number of its images, or why it cannot be written."""
        sizes, broken = [], {}
        try:
            with _replace(_file(self.folder, number)) as file:
                for position, row in enumerate(self.rows(number)):
                    try:
                        image = np.ascontiguousarray(self.image(row))
                        file.write(image.data)
                        sizes.append(image.shape[:2])
                    except BrokenImage as error:
                        sizes.append((0, 0))
                        broken[position] = str(error)
                index = json.dumps({"sizes": sizes, "broken": broken}).encode()
                file.write(index + len(index).to_bytes(_LENGTH_BYTES, "little"))
        except OSError as error:
            return error.strerror or str(error)
        return len(sizes)

    def rows(self, number: int) -> range:
        """Return the rows in a file."""
        first = number * _ROWS_PER_FILE
        return range(first, min(first + _ROWS_PER_FILE, len(self.images)))

    def image(self, row: int) -> np.ndarray:
        image = load_image(self.images[row], self.names[row], self.equalization, self.max_side_px)
        return before_crop(image, *self.key)

    def size(self, row: int) -> int:
        """Return the number of bytes of an image; 0 if it cannot be read."""
        try:
            return self.image(row).nbytes
        except BrokenImage:
            return 0

    def is_missing(self, number: int) -> bool:
        """Return whether a file must be made: it does not exist, or a broken image can be read now."""
        index = _read_index(_file(self.folder, number))
        return index is None or any(self.size(self.rows(number)[int(row)]) for row in index["broken"])

    def check_space(self, missing: Sequence[int]) -> None:
        """Raise a `UserError` if the disk has too little space, judging from the sizes of some images."""
        rows = [row for number in missing for row in self.rows(number)]
        sizes = [self.size(row) for row in rows[:: -(-len(rows) // _SAMPLE)]]
        needed, free = sum(sizes) / len(sizes) * len(rows), shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"the cache of {len(rows)} images in {self.folder.parent} needs about {needed / 1e9:.1f} GB, "
                f"and {free / 1e9:.1f} GB are free; make room there, or use a --cache folder on another disk"
            )


def _make(files: _Files, missing: Sequence[int], workers: int) -> None:
    loader = Loader(files, batch_size=None, sampler=missing, num_workers=min(workers, len(missing)))
    done = len(files.images) - sum(len(files.rows(number)) for number in missing)
    with progress(len(files.images), "cache", initial=done) as bar:
        for written in loader:
            if isinstance(written, str):
                raise UserError(f"cannot write the cache {files.folder}: {written}")
            bar.update(written)


@contextlib.contextmanager
def _replace(path: Path) -> Iterator[BinaryIO]:
    """Like `atomic.replace_file`, for a file that another process or machine may be writing as well."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # If it is gone, another process has completed the cache and removed all temporary files.
        with contextlib.suppress(FileNotFoundError):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.images"


def _read_index(path: Path) -> dict[str, Any] | None:
    """Return the `sizes` and `broken` of a file, or None if it is missing or incomplete."""
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
    """Return a hash of the images' locations and names, and of the sizes and times of their archives."""
    locations = rows["image"].tolist()
    parts = map(split_location, locations)
    states = []
    for archive in sorted({path for path, member in parts if member is not None}):
        with contextlib.suppress(OSError):  # its images are broken
            state = os.stat(archive)
            states.append([archive, state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps([locations, rows["name"].tolist(), states]).encode()).hexdigest()
