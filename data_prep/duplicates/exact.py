"""Images with equal bytes, wherever they are stored, with as little reading as possible.

The size comes first: from the file system, or from a zip archive's directory. Images of one size are told
apart by the CRC in the directory (members of zip archives) or by their first bytes (files). Only what is
still equal is read as a whole and compared by digest. Images in other kinds of archives are read at once.
"""

import hashlib
import zlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from featdistill import command_line
from featdistill.images import reading as image_io
from featdistill.images.archives import Archive, ArchiveError
from featdistill.images.listing import ARCHIVE_SEPARATOR, file_path, file_size, read_head, split_location

_HEAD_BYTES = 4096


@dataclass(slots=True)
class _Image:
    """What is known of the bytes of an image; `crc` and `digest` may be None until it is read."""

    location: str
    size: int
    crc: int | None = None
    digest: bytes | None = None

    def read(self) -> "_Image":
        if self.digest is None:
            data = image_io.read_bytes(self.location)
            self.size, self.crc = len(data), zlib.crc32(data)
            self.digest = hashlib.blake2b(data, digest_size=16).digest()
        return self


def equal_images(locations: Sequence[str]) -> tuple[list[list[int]], dict[int, str]]:
    """Find the images whose bytes are equal. A repeated location is equal to itself without being read.

    Returns:
        Sets of two or more positions in `locations`, each ascending, ordered by their first; reasons by
        position, for images that could not be examined. Damage goes unnoticed where nothing was read.
    """
    positions: dict[str, list[int]] = {}
    for position, location in enumerate(locations):
        positions.setdefault(location, []).append(position)
    faults: dict[str, str] = {}
    sets = _divide([_look_up(list(positions), faults)], lambda image: image.size, faults)
    by_head, by_crc = [], []
    for part in sets:
        if part[0].size > 0:
            (by_head if all(_is_file(image) for image in part) else by_crc).append(part)
    sets = _divide(by_head, _head, faults, "compare")
    sets += _divide(by_crc, lambda image: image.read().crc if image.crc is None else image.crc, faults)
    sets = _divide(sets, lambda image: image.read().digest, faults, "compare whole")
    equal = {part[0].location: [image.location for image in part] for part in sets}
    together = {same for part in equal.values() for same in part}
    equal |= {location: [location] for location in positions if location not in together}
    rows = [sorted(row for location in part for row in positions[location]) for part in equal.values()]
    reasons = {position: fault for location, fault in faults.items() for position in positions[location]}
    return sorted(part for part in rows if len(part) > 1), reasons


def _look_up(locations: list[str], faults: dict[str, str]) -> list[_Image]:
    """Return what can be known of each image, without reading it where that is possible."""
    members: dict[str, list[str]] = {}
    images = []
    for location in locations:
        archive, member = split_location(location)
        if member is not None and archive.lower().endswith(".zip"):
            members.setdefault(archive, []).append(member)
            continue
        try:
            is_file = member is None
            image = _Image(location, file_size(location) if is_file else 0)
            images.append(image if is_file else image.read())
        except (OSError, image_io.BrokenImage) as error:
            faults[location] = _reason(error)
    for archive, names in members.items():
        by_name = {name: f"{archive}{ARCHIVE_SEPARATOR}{name}" for name in names}
        try:
            opened = Archive(file_path(archive))
        except (OSError, ArchiveError) as error:
            faults |= dict.fromkeys(by_name.values(), _reason(error))
            continue
        for name, location in by_name.items():
            entry = opened.find(name)
            if entry is None or entry.fault:
                faults[location] = f"no member {name} in {archive}" if entry is None else entry.fault
            else:
                images.append(_Image(location, entry.size, entry.crc32))
    return images


def _divide(
    sets: Iterable[list[_Image]],
    key: Callable[[_Image], Hashable],
    faults: dict[str, str],
    title: str = "",
) -> list[list[_Image]]:
    """Divide each set by a key; drop single images and broken ones. `title` is that of a progress bar."""
    sets = list(sets)
    divided = []
    with command_line.progress(sum(map(len, sets)), title, show=bool(sets and title)) as bar:
        for images in sets:
            parts: dict[Hashable, list[_Image]] = {}
            for image in images:
                try:
                    parts.setdefault(key(image), []).append(image)
                except (OSError, image_io.BrokenImage) as error:
                    faults[image.location] = _reason(error)
                bar.update()
            divided += [part for part in parts.values() if len(part) > 1]
    return divided


def _is_file(image: _Image) -> bool:
    return split_location(image.location)[1] is None


def _head(image: _Image) -> bytes:
    return hashlib.blake2b(read_head(image.location, _HEAD_BYTES), digest_size=16).digest()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())
