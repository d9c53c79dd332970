"""Members of zip and tar archives, read where they lie: never unpacked, found by an index, one read each.

A process lists an archive once. A zip has its own list; that of a tar is made by walking over all headers
and kept beside the archive as `<archive>.index.npz`, which is valid as long as the archive's size and time of
change stay. Where the folder cannot be written to, the list is kept in memory alone.

Archives are untrusted. A member that is a link, a device or encrypted, or whose name leads out of the archive
or is no text, is listed with its fault and never read; the others are. What a member may unpack to is bounded
by `MAX_BYTES` and, above `MAX_FREE_BYTES`, by `MAX_RATIO`.
"""

import contextlib
import os
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from functools import lru_cache

from featdistill.images.archive_index import VERSION, Entry, Index, name_fault

# Between an archive's path and the member's name, in the `image` column of a manifest.
ARCHIVE_SEPARATOR = "::"
# Four bytes for each of the 89,478,485 pixels that an image may have (Pillow's limit): a member that claims
# more is a decompression bomb.
MAX_BYTES = 4 * 89_478_485
# Deflate reaches 1032:1, and no image of this size that is not flat comes near a tenth of that; what is
# smaller may be flat, and harms nobody.
MAX_RATIO = 100
MAX_FREE_BYTES = 1 << 24
ARCHIVE_SUFFIXES = (".zip", ".tar")
COMPRESSED_TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_ARCHIVES = 32  # archives whose list of members a process keeps
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1  # bit 0 of a member's general purpose flags, as the zip format defines them
# What a damaged header makes tarfile raise; a long chain of headers that continue each other, the last one.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field


class ArchiveError(Exception):
    """An archive, or a member of it, cannot be read; the message says why, in one line."""


class Archive:
    """A zip or tar archive that is open; any number of threads may read from it.

    Processes must not share one: a fork copies the handle, but not the place in the file that it stands for.

    Args:
        path: of the archive.

    Raises:
        ArchiveError: it is no archive, or one that is compressed as a whole.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        name = os.path.basename(path).lower()
        if name.endswith(COMPRESSED_TAR_SUFFIXES):
            raise ArchiveError(_compressed(path))
        self.path = path
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with the archive itself)
        self._lock = threading.Lock()
        try:
            status = os.fstat(self.file.fileno())
            listed = _tar_index if name.endswith(".tar") else _zip_index
            self.index = listed(path, status.st_size, status.st_mtime_ns)
        except BaseException:
            self.file.close()
            raise
        self._read = self._read_tar if name.endswith(".tar") else self._read_zip

    def read(self, name: str) -> bytes:
        """Return the bytes of a member.

        Raises:
            ArchiveError: there is no such member, or it is refused, damaged or too large.
            OSError: the disk fails.
        """
        entry = self.index.find(name.removeprefix("./"))
        if entry is None:
            damage = f"; {self.index.damage}" if self.index.damage else ""
            raise ArchiveError(f"no member {name} in {self.path}{damage}")
        if entry.fault:
            raise ArchiveError(f"{self.path}: member {name!r} {entry.fault}")
        if entry.size > MAX_BYTES:
            raise ArchiveError(f"{entry.size} bytes are more than the limit of {MAX_BYTES}")
        return self._read(entry)

    def _read_tar(self, entry: Entry) -> bytes:
        return self._at(entry.offset, entry.size)

    def _read_zip(self, entry: Entry) -> bytes:
        if entry.size > max(MAX_FREE_BYTES, MAX_RATIO * entry.stored_size):
            raise ArchiveError(
                f"{entry.size} bytes out of {entry.stored_size} are a decompression bomb: more than "
                f"{MAX_RATIO} to 1"
            )
        if entry.stored_size > MAX_BYTES + MAX_FREE_BYTES:
            raise ArchiveError(f"{entry.stored_size} bytes are more than the limit of {MAX_BYTES}")
        signature, name, extra = _LOCAL_HEADER.unpack(self._at(entry.offset, _LOCAL_HEADER.size))
        if signature != b"PK\x03\x04":
            raise ArchiveError(f"member {entry.name} of {self.path} is not where its directory says")
        data = self._at(entry.offset + _LOCAL_HEADER.size + name + extra, entry.stored_size)
        if entry.method == zipfile.ZIP_DEFLATED:
            # One byte more than it claims shows that it claims too little, and is all that is unpacked.
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, entry.size + 1)
            except zlib.error as error:
                raise ArchiveError(f"member {entry.name} of {self.path} is damaged: {error}") from error
        if len(data) != entry.size or zlib.crc32(data) != entry.crc32:
            raise ArchiveError(f"member {entry.name} of {self.path} is damaged: its checksum does not match")
        return data

    def _at(self, offset: int, size: int) -> bytes:
        data = self._some_at(offset, size)
        while len(data) < size and (more := self._some_at(offset + len(data), size - len(data))):
            data += more
        if len(data) < size:
            raise ArchiveError(f"{self.path} is truncated: it ends before byte {offset + size}")
        return data

    def _some_at(self, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self.file.fileno(), size, offset)
        # Windows has no read at a place: another thread must not move the file's place in between.
        with self._lock:
            self.file.seek(offset)
            return self.file.read(size)


# By the archive, not by the process: a forked worker uses what its parent has listed already.
@lru_cache(maxsize=_ARCHIVES)
def _tar_index(path: str, size: int, mtime_ns: int) -> Index:
    stamp, beside = [VERSION, size, mtime_ns], f"{path}.index.npz"
    index = Index.load(beside, stamp)
    if index is None:
        index = _list_tar(path)
        if index.damage:  # perhaps the disk's, and gone the next time
            return index
        with contextlib.suppress(OSError):  # a folder that cannot be written to: the index stays in memory
            index.save(beside, stamp)
    return index


def _list_tar(path: str) -> Index:
    entries, damage = [], ""
    with open(path, "rb") as file:
        if file.read(6).startswith(_COMPRESSED_STARTS):
            raise ArchiveError(_compressed(path))
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115 (closed below)
    except _TAR_ERRORS as error:
        raise ArchiveError(f"{path} is no plain tar archive ({error})") from error
    with archive:
        try:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile keeps every header it has seen
                if not member.isdir():
                    name = member.name.removeprefix("./")
                    fault = _tar_fault(member, name)
                    size = member.size
                    entries.append(Entry(name, fault, member.offset_data, size, size, 0, 0))
            # tarfile takes a damaged header for the end, which is a block of zeros, or that of the file.
            archive.fileobj.seek(archive.offset)
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            if block.strip(b"\0") or 0 < len(block) < tarfile.BLOCKSIZE:
                damage = "damaged header"
        except (*_TAR_ERRORS, OSError) as error:
            damage = " ".join(str(error).split()) or type(error).__name__
        if damage:
            damage = f"the archive is damaged or cut off after {len(entries)} members ({damage})"
    return Index.build(entries, damage)


def _tar_fault(member: tarfile.TarInfo, name: str) -> str:
    if member.issym():
        return "is a symbolic link"
    if member.islnk():
        return "is a hard link"
    if member.issparse():
        return "is a sparse file"
    return name_fault(name) if member.isreg() else "is a device or a pipe"


@lru_cache(maxsize=_ARCHIVES)
def _zip_index(path: str, size: int, mtime_ns: int) -> Index:
    try:
        with zipfile.ZipFile(path) as archive:
            return Index.build(_zip_entry(member) for member in archive.infolist() if not member.is_dir())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as error:
        raise ArchiveError(f"{path} is no whole zip archive ({error})") from error


def _zip_entry(member: zipfile.ZipInfo) -> Entry:
    name = member.filename.removeprefix("./")
    fault = name_fault(name)
    if stat.S_ISLNK(member.external_attr >> 16):
        fault = fault or "is a symbolic link"
    elif member.flag_bits & _ENCRYPTED:
        fault = fault or "is encrypted"
    elif member.compress_type not in _METHODS:
        fault = fault or "is compressed by a method other than deflate"
    sizes = member.file_size, member.compress_size
    return Entry(name, fault, member.header_offset, *sizes, member.CRC, member.compress_type)


def _compressed(path: str) -> str:
    return (
        f"{path} is compressed as a whole, so no member can be read alone; decompress it once to a plain .tar"
    )
