"""Files at addresses such as `s3://bucket/name`, in object storage or on web servers, through fsspec.

Addresses may come from a manifest that somebody else wrote, so only those of `SCHEMES` are opened, and never
a chain of several such as `zip::s3://..`. fsspec finds credentials and endpoints by itself.

What passes (a connection that breaks, also in the middle of a file; throttling; an error of the server) is
tried again after `WAITS_S`. What then fails for one file is an `OSError` that names it. Refused credentials,
a bucket that does not exist, a storage that cannot be reached and `MAX_FAILED` files in a row that fail are a
`UserError`: they concern all files.
"""

import contextlib
import errno
import io
import os
import posixpath
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from featdistill.command_line import UserError
from featdistill.remote_errors import AGAIN, code_of, explained, line_of, passes

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")
# The kinds of addresses, and the package that fsspec needs for each.
SCHEMES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
}
SCHEMES |= {"http": "aiohttp", "https": "aiohttp", "memory": "fsspec"}
# Those where a file can be created only if it does not exist.
_EXCLUSIVE = ("s3", "gs", "gcs", "az", "abfs", "memory")
# Each is drawn between half of it and all of it, so that many readers do not come back at once.
WAITS_S = (0.5, 2.0, 6.0)
# Then the storage is out of order, not the files.
MAX_FAILED = 20
# Read of a file at once; only if it is larger, its size is asked for, which takes another request.
_FIRST_BYTES = 4 << 20
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether a path is an address such as `s3://bucket/name`, not that of a file on this machine."""
    path = os.fspath(path)
    return "://" in path and _SCHEME.match(path) is not None


def located(path: str | os.PathLike) -> str | Path:
    """Return an address as text, and all else as a `Path`, which would spoil an address."""
    return os.fspath(path) if is_remote(path) else Path(path)


def check_manifests(paths: Iterable[str | os.PathLike]) -> None:
    """Raise a `UserError` if one on this machine, a file or a folder of parts, does not exist."""
    for path in map(located, paths):
        if isinstance(path, Path) and not path.exists():
            raise UserError(f"manifest {path} does not exist")


def is_web(address: str | os.PathLike) -> bool:
    """Return whether an address is that of a web server, which neither lists folders nor takes files."""
    return os.fspath(address).lower().startswith(("http://", "https://"))


def join(folder: str, name: str) -> str:
    """Return the address of a file by its path relative to a folder's address; an address stays as it is."""
    if is_remote(name):
        return name
    root = _SCHEME.match(folder)[0]
    return root + posixpath.normpath(posixpath.join("/", folder[len(root) :], name)).lstrip("/")


def read(address: str, limit_bytes: int | None = None) -> bytes:
    """Return the content of a file at an address.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, or is larger than the limit.
        UserError: none there can be read; see the top of this module.
    """
    data = read_start(address, _FIRST_BYTES)
    if len(data) >= _FIRST_BYTES:
        with _large(os.getpid()):
            if is_web(address):
                data = read_start(address, sys.maxsize if limit_bytes is None else limit_bytes + 1)
            else:
                file = RemoteFile(address)
                _check_limit(address, file.size, limit_bytes)
                data += file.read_at(len(data), file.size - len(data))
    _check_limit(address, len(data), limit_bytes)
    return data


def read_start(address: str, size: int) -> bytes:
    """Return the first bytes of a file at an address; raises what `read` does."""
    if is_web(address):
        return _retried(address, lambda system, path: _web_bytes(system, path, size))
    return _retried(address, lambda system, path: _part(system, path, 0, size))


def write(address: str, data: bytes) -> None:
    """Write a file at an address, whole or not at all, in place of one that exists."""
    _retried(address, lambda system, path: system.pipe_file(path, data))


def create(address: str, data: bytes) -> None:
    """Write a file at an address unless it exists.

    Raises:
        FileExistsError: it does.
        UserError: this kind of storage cannot promise that of several at once, only one writes.
    """
    if (scheme := _SCHEME.match(address)[1].lower()) not in _EXCLUSIVE:
        known = ", ".join(f"{name}://" for name in _EXCLUSIVE if name != "memory")
        raise UserError(f"{scheme}:// addresses cannot be shared by several processes, as can {known}")
    _retried(address, lambda system, path: system.pipe_file(path, data, mode="create"))


def remove(address: str) -> None:
    """Remove a file at an address; it may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        _retried(address, lambda system, path: system.rm_file(path))


def names(address: str) -> list[str]:
    """Return the names of the files in a folder's address; raises `FileNotFoundError` if there are none."""

    def inside(system: "AbstractFileSystem", path: str) -> list[str]:
        system.invalidate_cache(path)
        entries = system.ls(path, detail=True)
        return [entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file"]

    return _retried(address, inside)


def find(address: str) -> list[str]:
    """Return the sorted paths of all files below a folder's address, relative to it.

    Raises:
        UserError: it is on a web server, or there is no file.
    """
    if is_web(address):
        raise UserError(f"{address}: a web server does not list its files; name them in a manifest")

    def below(system: "AbstractFileSystem", path: str) -> list[str]:
        system.invalidate_cache(path)
        root = path.rstrip("/") + "/"
        return [name[len(root) :] for name in system.find(path) if name.startswith(root) and name != root]

    try:
        files = _retried(address, below)
    except FileNotFoundError:
        files = []
    if not files:
        raise UserError(f"{address} is not a folder with files")
    return sorted(files)


def check_access(addresses: Iterable[str]) -> None:
    """Read a byte from the first three files of each bucket, before a long run; paths are passed over.

    Raises:
        UserError: none of the three may be read, the bucket does not exist, or a package is missing.
    """
    buckets: dict[str, list[str]] = {}
    for address in addresses:
        if match := _SCHEME.match(address):
            # Of web servers, a manifest may name thousands.
            first = buckets.setdefault(match[0] if is_web(address) else _bucket(address), [])
            if len(first) < 3:
                first.append(address)
    for first in buckets.values():
        check_package(first[0])
        denied = [error for address in first if not is_web(address) and (error := _denial(address))]
        if denied and len(denied) == len(first):
            raise UserError(f"{denied[0]}; check the credentials")


def check_package(address: str) -> None:
    """Raise a `UserError` for a kind of address that is not read, or whose package is missing."""
    _open_system(address)


def _denial(address: str) -> PermissionError | None:
    try:
        read_start(address, 1)
    except PermissionError as error:
        return error
    except OSError:  # the reason of this one image, when its turn comes
        pass
    return None


class RemoteFile(io.RawIOBase):
    """A file at an address, read by ranges of bytes, at any position; any number of threads may read it.

    Attributes:
        size: in bytes.
        stamp: changes when the file does, as far as the storage tells.

    Raises:
        FileNotFoundError, OSError, UserError: as `read`.
    """

    def __init__(self, address: str) -> None:
        info = _retried(address, lambda system, path: system.info(path))
        if info.get("type") == "directory":
            raise IsADirectoryError(f"{address} is a folder")
        if info.get("size") is None:
            raise OSError(f"{address}: the server does not tell its size")
        self.address, self.size, self._position = address, int(info["size"]), 0
        known = (
            "ETag",
            "etag",
            "LastModified",
            "Last-Modified",
            "last_modified",
            "mtime",
            "updated",
            "created",
        )
        self.stamp = str([info.get(name) for name in known])

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from a position on, fewer at the end of the file."""
        end = min(offset + size, self.size)
        if end <= offset:
            return b""

        def exactly(system: "AbstractFileSystem", path: str) -> bytes:
            if is_web(self.address):
                # One byte more shows that the server sends the whole file instead.
                data = _web_bytes(system, path, end - offset + 1, f"bytes={offset}-{end - 1}")
            else:
                data = _part(system, path, offset, end - offset)
            if len(data) < end - offset:
                raise ConnectionError(f"ended after {len(data)} of {end - offset} bytes")
            if len(data) > end - offset:
                raise ValueError("the server does not serve ranges of bytes; copy the file here")
            return data

        return _retried(self.address, exactly)

    def readinto(self, buffer: memoryview) -> int:
        data = self.read_at(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "position before the start", self.address)
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def open_remote(address: str, buffer_bytes: int = 1 << 20) -> BinaryIO:
    """Open a file at an address for reading at any position, `buffer_bytes` per request."""
    return io.BufferedReader(RemoteFile(address), buffer_bytes)


def _open_system(address: str) -> tuple["AbstractFileSystem", str]:
    """Return the file system of an address, and what it calls the file there."""
    scheme = _SCHEME.match(address)[1].lower()
    system = _system(scheme, os.getpid())
    return system, system._strip_protocol(address)


# One per process: those of fsspec that are asynchronous do not survive a fork.
@lru_cache(maxsize=len(SCHEMES) + 1)
def _system(scheme: str, process: int) -> "AbstractFileSystem":
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES if name != "memory")
        raise UserError(f"{scheme}:// addresses are not read; known: {known}")
    try:
        import fsspec

        return fsspec.filesystem(scheme, skip_instance_cache=True)
    except ImportError as error:
        package = SCHEMES[scheme]
        raise UserError(f"{scheme}:// addresses need the package {package}; pip install {package}") from error
    except Exception as error:  # some ask for credentials here, each with errors of its own
        raise UserError(f"{scheme}:// cannot be opened ({line_of(error)}); check the credentials") from error


@lru_cache(maxsize=2)
def _large(process: int) -> threading.Lock:
    """Return what lets one thread at a time read a large file, which bounds the memory."""
    return threading.Lock()


def _part(system: "AbstractFileSystem", path: str, start: int, size: int) -> bytes:
    try:
        return system.cat_file(path, start=start, end=start + size)
    except Exception as error:
        if code_of(error) in ("416", "InvalidRange"):  # the file ends before; an empty one always does
            return b""
        raise


def _web_bytes(system: "AbstractFileSystem", path: str, most: int, wanted: str = "") -> bytes:
    """Return up to `most` bytes from a web server, which may send more than the range that is wanted."""
    headers = {"headers": {"Range": wanted}} if wanted else {}
    data = bytearray()
    # A block size of 0 makes a stream, and a size saves the request that would ask for it.
    with system.open(path, block_size=0, size=1, **headers) as stream:
        while len(data) < most and (more := stream.read(1 << 20)):
            data += more
    return bytes(data[:most])


def _check_limit(address: str, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise OSError(f"{address}: more bytes than the limit of {limit}")


def _bucket(address: str) -> str:
    """Return the start of an address, up to the name of the bucket or the web server."""
    return address[: (address + "/").index("/", _SCHEME.match(address).end())]


# Files in a row, by bucket, that could not be read for what passes.
_failed: dict[str, int] = {}


def _count_failure(address: str, error: Exception) -> None:
    """Raise a `UserError` once `MAX_FAILED` files in a row fail for what passes: it concerns all of them."""
    if passes(error):
        bucket = _bucket(address)
        _failed[bucket] = count = _failed.get(bucket, 0) + 1
        if count >= MAX_FAILED:
            _failed.pop(bucket, None)
            reason = f"{MAX_FAILED} files in a row could not be read, the last one for {line_of(error)}"
            raise UserError(f"{bucket}: {reason}; {AGAIN}") from error


def _retried(address: str, action: Callable[["AbstractFileSystem", str], T]) -> T:
    """Do something with the file at an address; see the top of this module for its errors."""
    system, path = _open_system(address)
    for wait_s in (*WAITS_S, None):
        try:
            result = action(system, path)
            if _failed:
                _failed.pop(_bucket(address), None)
            return result
        except Exception as error:
            if wait_s is None or not passes(error):
                _count_failure(address, error)
                raise explained(address, error, is_web(address), len(WAITS_S) + 1) from error
        time.sleep(wait_s * random.uniform(0.5, 1))
    raise AssertionError
