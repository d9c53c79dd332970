"""Files wherever they are: on this machine, or where fsspec reaches, as in `s3://bucket/folder`."""

import contextlib
import os
import re
import uuid
from pathlib import Path
from typing import Any, BinaryIO

from featdistill import atomic

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether a path is an address such as `s3://bucket/name`, not that of a file on this machine."""
    return _SCHEME.match(os.fspath(path)) is not None


class Folder:
    """A folder of files, which several processes and machines may use at once.

    Args:
        address: a path, or an address that fsspec knows; it need not exist.

    Raises:
        UserError: a package for this kind of address is missing.
    """

    def __init__(self, address: str | os.PathLike) -> None:
        self.address = os.fspath(address).rstrip("/")
        self._path, self._system = Path(self.address), None
        if is_remote(self.address):
            import fsspec

            self._system, self._root = fsspec.core.url_to_fs(self.address)

    def names(self, suffix: str = "") -> list[str]:
        """Return the sorted names of the files with a suffix, not of hidden ones; none without a folder."""
        if self._system:
            self._system.invalidate_cache(self._root)
            with contextlib.suppress(FileNotFoundError):
                entries = self._system.ls(self._root, detail=True)
                files = [entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file"]
                return sorted(name for name in files if name.endswith(suffix) and not name.startswith("."))
            return []
        with contextlib.suppress(FileNotFoundError), os.scandir(self._path) as entries:
            files = [entry.name for entry in entries if entry.is_file()]
            return sorted(name for name in files if name.endswith(suffix) and not name.startswith("."))
        return []

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading at any position; raises `FileNotFoundError`."""
        return self._system.open(self._at(name), "rb") if self._system else (self._path / name).open("rb")

    def read(self, name: str) -> bytes:
        """Return the content of a file; raises `FileNotFoundError`."""
        return self._system.cat_file(self._at(name)) if self._system else (self._path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all, in place of one that exists."""
        if self._system:
            self._system.pipe_file(self._at(name), data)
            return
        with atomic.replace_file(self._path / name) as temporary:
            temporary.write_bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; of several that try at once, exactly one gets True."""
        if self._system:
            try:
                self._system.pipe_file(self._at(name), data, mode="create")
            except FileExistsError:
                return False
            return True
        target, temporary = self._path / name, self._path / f".{name}.{uuid.uuid4().hex}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.link(temporary, target)  # unlike a rename, it fails if the target exists
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> None:
        """Remove a file; it may be gone already."""
        with contextlib.suppress(FileNotFoundError):
            if self._system:
                self._system.rm_file(self._at(name))
            else:
                (self._path / name).unlink()

    def _at(self, name: str) -> Any:
        return f"{self._root.rstrip('/')}/{name}"
