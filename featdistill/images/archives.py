"""Members of zip and tar archives, read in place: never unpacked, found by an index, one read each.

A process lists an archive once. A zip has its own list; that of a tar is made by walking over all headers and
saved next to the archive as `<archive>.index.npz`, which is valid until the archive's size or modification
time changes. Where the folder cannot be written to, the list is kept in memory only.

Archives are untrusted. A member that is a link, a device or encrypted, or whose name leads out of the archive
or is not valid text, is listed with its fault and never read; the others are. The size that a member may
unpack to is limited to `MAX_BYTES` and, above `MAX_FREE_BYTES`, by `MAX_RATIO`.

Of an archive in object storage, the list and each member are read by ranges of bytes. The list of a tar there
takes reading all of its headers, in each process, and is not saved: a zip is better.
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
from typing import BinaryIO

from featdistill.command_line import counted
from featdistill.images.archive_index import VERSION, Entry, Index, name_fault, normalized
from featdistill.images.formats import HEAD_BYTES
from featdistill.remote_files import RemoteFile, is_remote, open_remote

# Four bytes for each of the 89,478,485 pixels that Pillow allows; a member that claims more is a bomb.
MAX_BYTES = 4 * 89_478_485
# Deflate reaches 1032:1, and only flat images come near a tenth of that. Below 16 MiB they do no harm.
MAX_RATIO = 100
MAX_FREE_BYTES = 1 << 24
ARCHIVE_SUFFIXES = (".zip", ".tar")
COMPRESSED_TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_ARCHIVES = 32  # archives whose list of members a process keeps
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1  # bit 0 of a member's general purpose flags in the zip format
# Raised by tarfile for damaged headers; the last one for a long chain of headers that continue each other.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)
_UTF_8 = 0x800  # bit 11: the name is UTF-8
_HEAD_STORED_BYTES = 4096  # of a compressed member, for its first `HEAD_BYTES`
_LIST_BYTES = 8 << 20  # read at once, while the members of an archive in object storage are listed
_LOCAL_NAME_BYTES = 512  # enough for most members' names and extra fields, which are read with the data
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field


class ArchiveError(Exception):
    """An archive or parquet file, or a part of it, cannot be read; the message says why in one line."""


class Archive:
    """An open zip or tar archive; any number of threads may read from it.

    Processes must not share one: a fork copies the handle, but not the file position behind it.

    Raises:
        ArchiveError: it is not an archive, or is compressed as a whole.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        name = os.path.basename(path).lower()
        if name.endswith(COMPRESSED_TAR_SUFFIXES):
            raise ArchiveError(_compressed(path))
        self.path, self._is_tar, self._is_remote = path, name.endswith(".tar"), is_remote(path)
        list_members = _tar_index if self._is_tar else _zip_index
        self._lock = threading.Lock()
        if self._is_remote:
            self.file = RemoteFile(path)
            self.index = list_members(path, self.file.size, self.file.stamp)
            return
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with the archive itself)
        try:
            status = os.fstat(self.file.fileno())
            self.index = list_members(path, status.st_size, status.st_mtime_ns)
        except BaseException:
            self.file.close()
            raise

    def read(self, name: str) -> bytes:
        """Return the bytes of a member.

        Raises:
            ArchiveError: there is no such member, or it is refused, damaged or too large.
            OSError: the disk fails.
        """
        entry = self.find(name)
        if entry is None:
            damage = f"; {self.index.damage}" if self.index.damage else ""
            raise ArchiveError(f"no member {name} in {self.path}{damage}")
        if entry.fault:
            raise ArchiveError(f"{self.path}: member {name!r} {entry.fault}")
        check_size(entry.size)
        return self._at(entry.offset, entry.size) if self._is_tar else self._read_zip(entry)

    def find(self, name: str) -> Entry | None:
        """Return the member with a name, however its path is spelled."""
        entry = self.index.find(name)
        return entry or self.index.find(normalized(name if self._is_tar else _zip_name(name)))

    def head(self, name: str) -> bytes | None:
        """Return the first bytes of a member, enough to tell a format; None if they cannot be read."""
        try:
            entry = self.find(name)
            if entry is None or entry.fault:
                return None
            if self._is_tar:
                return self._at(entry.offset, min(entry.size, HEAD_BYTES))
            data = self._stored(entry, _HEAD_STORED_BYTES)
            if entry.method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, HEAD_BYTES)
            return data[:HEAD_BYTES]
        except (ArchiveError, OSError, zlib.error):
            return None

    def _read_zip(self, entry: Entry) -> bytes:
        if entry.size > max(MAX_FREE_BYTES, MAX_RATIO * entry.stored_size):
            raise ArchiveError(
                f"{entry.size} bytes out of {entry.stored_size} are a decompression bomb: more than "
                f"{MAX_RATIO} to 1"
            )
        check_size(entry.stored_size, MAX_BYTES + MAX_FREE_BYTES)
        member = f"member {entry.name} of {self.path}"
        data = self._stored(entry, entry.stored_size)
        if entry.method == zipfile.ZIP_DEFLATED:
            # At most one byte more than the claimed size is unpacked, which shows that the claim is wrong.
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, entry.size + 1)
            except zlib.error as error:
                raise ArchiveError(f"{member} is damaged: {error}") from error
        if len(data) != entry.size or zlib.crc32(data) != entry.crc32:
            raise ArchiveError(f"{member} is damaged: its checksum does not match")
        return data

    def _stored(self, entry: Entry, most: int) -> bytes:
        """Return the first bytes of a zip's member as they are stored."""
        size, before = min(entry.stored_size, most), b""
        if self._is_remote:  # in one request
            before = self.file.read_at(entry.offset, _LOCAL_HEADER.size + _LOCAL_NAME_BYTES + size)
        header = before[: _LOCAL_HEADER.size] if before else self._at(entry.offset, _LOCAL_HEADER.size)
        signature, name, extra = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\x03\x04":
            raise ArchiveError(f"member {entry.name} of {self.path} is not where the zip's directory says")
        start = _LOCAL_HEADER.size + name + extra
        if len(before) >= start + size:
            return before[start : start + size]
        return self._at(entry.offset + start, size)

    def _at(self, offset: int, size: int) -> bytes:
        data = self._some_at(offset, size)
        while len(data) < size and (more := self._some_at(offset + len(data), size - len(data))):
            data += more
        if len(data) < size:
            raise ArchiveError(f"{self.path} is truncated: it ends before byte {offset + size}")
        return data

    def _some_at(self, offset: int, size: int) -> bytes:
        if self._is_remote:
            return self.file.read_at(offset, size)
        if hasattr(os, "pread"):
            return os.pread(self.file.fileno(), size, offset)
        # Windows lacks pread: no other thread may move the file position in between.
        with self._lock:
            self.file.seek(offset)
            return self.file.read(size)


def check_size(size: int, limit: int | None = None) -> None:
    """Raise an `ArchiveError` for a size above a limit, `MAX_BYTES` by default."""
    limit = MAX_BYTES if limit is None else limit
    if size > limit:
        raise ArchiveError(f"{size} bytes are more than the limit of {limit}")


# Keyed by the archive, not by the process: a forked worker uses the list of its parent.
@lru_cache(maxsize=_ARCHIVES)
def _tar_index(path: str, size: int, mtime_ns: int | str) -> Index:
    if is_remote(path):
        return _list_tar(path)
    stamp, index_path = [VERSION, size, mtime_ns], f"{path}.index.npz"
    index = Index.load(index_path, stamp)
    if index is None:
        index = _list_tar(path)
        if index.damage:  # maybe a disk error that is gone the next time
            return index
        with contextlib.suppress(OSError):  # a read-only folder: the index stays in memory
            index.save(index_path, stamp)
    return index


def _list_tar(path: str) -> Index:
    entries, damage = [], ""
    with _opened(path) as file:
        if file.read(6).startswith(_COMPRESSED_STARTS):
            raise ArchiveError(_compressed(path))
        file.seek(0)
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (nothing to close but the file)
        except _TAR_ERRORS as error:
            raise ArchiveError(f"{path} is not a plain tar archive ({error})") from error
        try:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile keeps every header it has seen
                if not member.isdir():
                    fault, size = _tar_fault(member), member.size
                    name = member.name if fault else normalized(member.name)
                    entries.append(Entry(name, fault, member.offset_data, size, size, 0, 0))
            # tarfile treats a damaged header as the end, which is a block of zeros or the end of the file.
            archive.fileobj.seek(archive.offset)
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            if block.strip(b"\0") or 0 < len(block) < tarfile.BLOCKSIZE:
                damage = "damaged header"
        except (*_TAR_ERRORS, OSError) as error:
            if is_remote(path) and isinstance(error, OSError):  # of the connection
                raise
            damage = " ".join(str(error).split()) or type(error).__name__
        if damage:
            damage = f"the archive is damaged or truncated after {counted(len(entries), 'member')} ({damage})"
    return Index.build(entries, damage)


def _opened(path: str) -> BinaryIO:
    return open_remote(path, _LIST_BYTES) if is_remote(path) else open(path, "rb")


def _tar_fault(member: tarfile.TarInfo) -> str:
    if member.issym():
        return "is a symbolic link"
    if member.islnk():
        return "is a hard link"
    if member.issparse():
        return "is a sparse file"
    return name_fault(member.name) if member.isreg() else "is a device or a pipe"


@lru_cache(maxsize=_ARCHIVES)
def _zip_index(path: str, size: int, mtime_ns: int | str) -> Index:
    try:
        with _opened(path) as file, zipfile.ZipFile(file) as archive:
            members = (member for member in archive.infolist() if not member.filename.endswith(("/", "\\")))
            return Index.build(map(_zip_entry, members))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as error:
        if is_remote(path) and isinstance(error.__context__, OSError):  # zipfile takes any for damage
            raise error.__context__ from None
        raise ArchiveError(f"{path} is not a complete zip archive ({error})") from error


def _zip_entry(member: zipfile.ZipInfo) -> Entry:
    name = member.filename
    if not member.flag_bits & _UTF_8:
        # Python reads such a name as code page 437. macOS writes UTF-8 without saying so.
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    fault = name_fault(name)
    if stat.S_ISLNK(member.external_attr >> 16):
        fault = fault or "is a symbolic link"
    elif member.flag_bits & _ENCRYPTED:
        fault = fault or "is encrypted"
    elif member.compress_type not in _METHODS:
        fault = fault or "is compressed by a method other than deflate"
    name = name if fault else normalized(_zip_name(name))
    sizes = member.file_size, member.compress_size
    return Entry(name, fault, member.header_offset, *sizes, member.CRC, member.compress_type)


def _zip_name(name: str) -> str:
    """Return the name of a zip's member with `/`, which some programs for Windows write as a backslash."""
    return name.replace("\\", "/")


def _compressed(path: str) -> str:
    return (
        f"{path} is compressed as a whole, so its members cannot be read; decompress it once to a plain .tar"
    )
