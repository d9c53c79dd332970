"""Images whose bytes are equal, wherever they lie, with as little reading as that takes.

The size comes first: from the file system, or from a zip archive's directory. Of one size, members of zip
archives are told apart by the CRC that the directory holds, files by their first bytes. Only what is still
equal is read whole and compared by digest. What lies in another kind of archive is read whole at once.
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from featdistill import command_line
from featdistill.images import reading as image_io
from featdistill.images.archives import ARCHIVE_SEPARATOR

_HEAD_BYTES = 4096


@dataclass(slots=True)
class _Image:
    """What is known of an image's bytes; `crc` and `digest` are None until they are."""

    location: str
    size: int
    crc: int | None = None
    digest: bytes | None = None

    def read(self) -> None:
        data = image_io.read_bytes(self.location)
        self.size, self.crc = len(data), zlib.crc32(data)
        self.digest = hashlib.blake2b(data, digest_size=16).digest()


def equal_images(locations: Sequence[str]) -> tuple[list[list[int]], dict[int, str]]:
    """Find the images whose bytes are equal. A location that is given twice is equal to itself, unread.

    Returns:
        The sets of two or more places in `locations`, each ascending, ordered by their first; by place, why
        an image could not be looked at. Of what needed no reading, damage is not noticed.
    """
    places: dict[str, list[int]] = {}
    for place, location in enumerate(locations):
        places.setdefault(location, []).append(place)
    faults: dict[str, str] = {}
    images = _look_up(list(places), faults)
    sets = _divide([images], lambda image: image.size, faults)
    sets = [part for part in sets if part[0].size > 0]
    by_crc, by_head = [], []
    for part in sets:
        are_files = all(_is_file(image) for image in part)
        (by_head if are_files else by_crc).append(part)
    with command_line.progress(sum(map(len, by_head)), "compare", show=bool(by_head)) as bar:
        by_head = _divide(by_head, _head, faults, bar.update)
    by_crc = _divide(by_crc, _crc, faults)
    sets = by_head + by_crc
    with command_line.progress(sum(map(len, sets)), "compare whole", show=bool(sets)) as bar:
        sets = _divide(sets, _digest, faults, bar.update)
    equal = {part[0].location: [image.location for image in part] for part in sets}
    together = {same for part in equal.values() for same in part}
    equal |= {location: [location] for location, own in places.items() if location not in together}
    rows = [sorted(place for location in part for place in places[location]) for part in equal.values()]
    return (
        sorted(part for part in rows if len(part) > 1),
        {place: fault for location, fault in faults.items() for place in places[location]},
    )


def _look_up(locations: list[str], faults: dict[str, str]) -> list[_Image]:
    """Return what can be known of each image without reading it, where that can be."""
    members: dict[str, list[str]] = {}
    images = []
    for location in locations:
        archive, separator, member = location.partition(ARCHIVE_SEPARATOR)
        if separator and archive.lower().endswith(".zip"):
            members.setdefault(archive, []).append(member)
            continue
        image = _Image(location, 0)
        try:
            if separator:
                image.read()
            else:
                image.size = os.path.getsize(location)
            images.append(image)
        except (OSError, image_io.BrokenImage) as error:
            faults[location] = _reason(error)
    for archive, names in members.items():
        try:
            with zipfile.ZipFile(archive) as opened:
                there = {info.filename: (info.file_size, info.CRC) for info in opened.infolist()}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            faults |= {f"{archive}{ARCHIVE_SEPARATOR}{name}": _reason(error) for name in names}
            continue
        for name in names:
            location = f"{archive}{ARCHIVE_SEPARATOR}{name}"
            if name in there:
                images.append(_Image(location, *there[name]))
            else:
                faults[location] = f"no member {name} in {archive}"
    return images


def _divide(
    sets: Iterable[list[_Image]],
    key: Callable[[_Image], Hashable],
    faults: dict[str, str],
    done: Callable[[], object] = lambda: None,
) -> list[list[_Image]]:
    """Divide each set by a key and drop what is alone, or cannot be read."""
    divided = []
    for images in sets:
        parts: dict[Hashable, list[_Image]] = {}
        for image in images:
            try:
                parts.setdefault(key(image), []).append(image)
            except (OSError, image_io.BrokenImage) as error:
                faults[image.location] = _reason(error)
            done()
        divided += [part for part in parts.values() if len(part) > 1]
    return divided


def _is_file(image: _Image) -> bool:
    return ARCHIVE_SEPARATOR not in image.location


def _head(image: _Image) -> bytes:
    with Path(image.location).open("rb") as file:
        return hashlib.blake2b(file.read(_HEAD_BYTES), digest_size=16).digest()


def _crc(image: _Image) -> int:
    if image.crc is None:
        image.read()
    return image.crc


def _digest(image: _Image) -> bytes:
    if image.digest is None:
        image.read()
    return image.digest


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())
