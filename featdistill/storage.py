"""Folders on this machine or in object storage, alike, for several processes at once."""

import contextlib
import os
import uuid
from pathlib import Path
from typing import BinaryIO

from featdistill import atomic, remote_files
from featdistill.remote_files import is_remote


class Folder:
    """A folder of files, which several processes and machines may use at once.

    Args:
        address: a path, or an address; it need not exist.

    Raises:
        UserError: a package for this kind of address is missing.
    """

    def __init__(self, address: str | os.PathLike) -> None:
        self.address = os.fspath(address).rstrip("/")
        self._path, self._remote = Path(self.address), is_remote(self.address)
        if self._remote:
            remote_files.check_package(self.address)

    def names(self, suffix: str = "") -> list[str]:
        """Return the sorted names of the files with a suffix, not of hidden ones; none without a folder."""
        files: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            if self._remote:
                files = remote_files.names(self.address)
            else:
                with os.scandir(self._path) as entries:
                    files = [entry.name for entry in entries if entry.is_file()]
        return sorted(name for name in files if name.endswith(suffix) and not name.startswith("."))

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading at any position; raises `FileNotFoundError`."""
        return remote_files.open_remote(self._at(name)) if self._remote else (self._path / name).open("rb")

    def read(self, name: str) -> bytes:
        """Return the content of a file; raises `FileNotFoundError`."""
        return remote_files.read(self._at(name)) if self._remote else (self._path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all, in place of one that exists."""
        if self._remote:
            remote_files.write(self._at(name), data)
            return
        with atomic.replace_file(self._path / name) as temporary:
            temporary.write_bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; of several that try at once, exactly one gets True.

        After a connection that broke, it may say False although this call has written the file.

        Raises:
            UserError: this kind of storage cannot promise that.
        """
        if self._remote:
            try:
                remote_files.create(self._at(name), data)
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
        if self._remote:
            remote_files.remove(self._at(name))
        else:
            (self._path / name).unlink(missing_ok=True)

    def _at(self, name: str) -> str:
        return f"{self.address}/{name}"
