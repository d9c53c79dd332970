"""Writing a bank batch by batch, such that a killed run continues and several processes can share the work.

The arrays have their full size from the start, so a full disk shows before hours of work. Each process writes
its batches in place, and then adds a line to its journal in the bank's folder: the batch's number, its broken
rows, and what was drawn for the others.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featdistill import atomic
from featdistill.bank.store import DRAWN_FILE, ERRORS_FILE, MANIFEST_FILE, RECORD_FILE, open_bank
from featdistill.command_line import UserError
from featdistill.inference.journal import journal_path
from featdistill.models.features import Atom
from featdistill.records.manifest import write_manifest
from featdistill.records.provenance import Claim, as_json, claim, read_record

# Entries of `bank.json` that say what there is, not what it is made from.
_RESULTS = ("finished", "files", "versions")


def claim_bank(path: Path, requested: dict[str, Any], rows: pd.DataFrame) -> Claim:
    """Decide whether a bank is to be made, continued, or finished; bring the columns of its rows up to date.

    Columns that do not decide the features, such as labels, may change at any time.

    Raises:
        UserError: the folder holds another bank or something else, or files of a finished bank have changed.
    """
    recorded = read_record(path / RECORD_FILE)
    finished = bool(recorded and recorded.get("finished"))
    made_from = recorded and _comparable(recorded)
    requested = _comparable(requested)
    # Another spelling of the same features is not another bank.
    ignore = ["features"] if recorded and made_from["kept"] == requested["kept"] else []
    occupied = path.is_file() or (path.is_dir() and any(path.iterdir()))
    state = claim(path, made_from, requested, finished=finished, occupied=occupied, ignore=ignore)
    if state is Claim.NEW:
        path.mkdir(parents=True, exist_ok=True)
    write_manifest(rows, path / MANIFEST_FILE)
    if state is Claim.FINISHED:
        files = recorded["files"] | {MANIFEST_FILE: atomic.sha256_of(path / MANIFEST_FILE)}
        if files != recorded["files"]:
            atomic.write_json(path / RECORD_FILE, recorded | {"files": files})
        bank = open_bank(path)
        for name in files:
            bank.file(name)
        _remove_journals(path)
    return state


class BankWriter:
    """The arrays of a bank that is being made, and the journal to which this process adds.

    Args:
        path: of the bank.
        record: what it is made from.
        rank, world: which of how many processes this is.

    Attributes:
        done: (batches,) bool.
        broken: row -> why its image could not be read.
    """

    def __init__(self, path: Path, record: dict[str, Any], rank: int = 0, world: int = 1) -> None:
        self.path, self.record = path, record
        self.rows, self.batch_size = record["rows"], record["batch_size"]
        self.dtype, views = np.dtype(record["dtype"]), len(record["views"]["names"])
        self.shapes = {
            Atom(atom["kind"], atom["layer"]): (self.rows, views, *atom["shape"]) for atom in record["atoms"]
        }
        self.done = np.zeros(-(-self.rows // self.batch_size), bool)
        self.broken: dict[int, str] = {}
        self._drawn: dict[int, str] = {}
        self._journal = journal_path(path / RECORD_FILE, rank, world)

    def prepare(self) -> None:
        """Write the record, and give the arrays their size; in the main process, before the others open."""
        missing = [atom for atom, shape in self.shapes.items() if not self._is_complete(atom, shape)]
        if missing:
            # The journals may list batches that were in files which are gone.
            _remove_journals(self.path)
        needed = sum(self._bytes(self.shapes[atom]) for atom in missing)
        try:
            atomic.write_json(self.path / RECORD_FILE, {**self.record, "finished": False})
            for atom in missing:
                self._create(atom)
        except OSError as error:
            free = shutil.disk_usage(self.path).free
            raise UserError(
                f"cannot write the bank {self.path}: {error.strerror or error} (it needs {_size(needed)}, "
                f"and {_size(free)} are free); make room, or keep fewer features or views"
            ) from error

    def open(self) -> None:
        """Read all journals, and open that of this process."""
        self.refresh()
        content = self._journal.read_bytes() if self._journal.is_file() else b""
        if content and not content.endswith(b"\n"):
            # A kill left part of a line, which the next one must not continue.
            with self._journal.open("ab") as file:
                file.write(b"\n")

    def missing(self) -> list[int]:
        """Return the numbers of the batches that are not written yet."""
        return np.flatnonzero(~self.done).tolist()

    def batch_rows(self, number: int) -> range:
        """Return the rows of a batch."""
        return range(self.rows)[number * self.batch_size : (number + 1) * self.batch_size]

    def write(
        self,
        number: int,
        values: dict[Atom, np.ndarray],
        drawn: dict[int, str],
        broken: Sequence[tuple[int, str]],
    ) -> None:
        """Write a batch, and hand it to the system, so that it survives a kill of this process.

        Args:
            values: atom -> (rows of the batch, views, ...) float32.
            drawn: row -> JSON of what was drawn for its views.
            broken: (row, reason) of the images that could not be read; their values become NaN.
        """
        part = self.batch_rows(number)
        line = json.dumps([number, list(broken), list(drawn.items())]).encode() + b"\n"
        with atomic.system_errors(self.path):
            for atom, array in values.items():
                row_bytes = self._bytes(self.shapes[atom]) // self.rows
                with self._file(atom).open("r+b") as file:
                    file.seek(-row_bytes * (self.rows - part.start), os.SEEK_END)
                    file.write(self._cast(atom, array, [row - part.start for row, _ in broken]).data)
            with self._journal.open("ab") as file:
                file.write(line)
        self._add(line)

    def refresh(self) -> None:
        """Read what all journals contain now."""
        for journal in _journals(self.path):
            with journal.open("rb") as file:
                for line in file:
                    self._add(line)

    def finish(self, rows: pd.DataFrame, versions: dict[str, str]) -> None:
        """Complete the bank from all journals, in the main process."""
        self.refresh()
        if missing := self.missing():
            raise UserError(
                f"{len(missing)} batches of {self.path} are missing; the folder must be the same for all "
                "processes; run the same command again to continue"
            )
        names = rows["name"].tolist()
        errors = [(names[row], reason) for row, reason in sorted(self.broken.items())]
        nothing = json.dumps([[] for _ in self.record["views"]["names"]])
        drawn = (self._drawn.get(row, nothing) + "\n" for row in range(self.rows))
        atomic.write_text(self.path / DRAWN_FILE, "".join(drawn))
        atomic.write_text(self.path / ERRORS_FILE, atomic.csv_text(["name", "reason"], errors))
        files = [
            *map(self._file, self.shapes),
            *map(self.path.joinpath, (MANIFEST_FILE, DRAWN_FILE, ERRORS_FILE)),
        ]
        for file in files:
            with file.open("r+b") as written:
                os.fsync(written.fileno())
        hashes = {file.name: atomic.sha256_of(file) for file in files}
        results = {"files": hashes, "versions": versions, "finished": True}
        atomic.write_json(self.path / RECORD_FILE, as_json(self.record | results))
        _remove_journals(self.path)

    def _cast(self, atom: Atom, array: np.ndarray, broken: list[int]) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array, self.dtype)
        stored[broken] = np.nan
        good = np.delete(stored, broken, axis=0)
        if not np.isfinite(good).all():
            if np.isfinite(np.delete(array, broken, axis=0)).all():
                raise UserError(
                    f"{atom.name} has values beyond the range of {self.dtype} (65504); use --dtype float32, "
                    "with another --out"
                )
            raise UserError(
                f"{atom.name} is not a finite number for some images; check the weights, or use --precision "
                "fp32"
            )
        return stored

    def _file(self, atom: Atom) -> Path:
        return self.path / f"{atom.name}.npy"

    def _bytes(self, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize

    def _is_complete(self, atom: Atom, shape: tuple[int, ...]) -> bool:
        try:
            return np.load(self._file(atom), mmap_mode="r").shape == shape
        except (OSError, ValueError):
            return False

    def _create(self, atom: Atom) -> None:
        shape, description = self.shapes[atom], np.lib.format.dtype_to_descr(self.dtype)
        with self._file(atom).open("wb") as file:
            header = {"descr": description, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            size = file.tell() + self._bytes(shape)
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)

    def _add(self, line: bytes) -> None:
        try:
            number, broken, drawn = json.loads(line)
            if self.done[number]:
                return
            reasons, texts = dict(broken), dict(drawn)
        except (ValueError, TypeError, IndexError):  # cut short: the batch is made again
            return
        self.broken |= reasons
        self._drawn |= texts
        self.done[number] = True


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    """Return what a bank is made from: first its features, then the names of its atoms as `kept`."""
    kept = [Atom(atom["kind"], atom["layer"]).name for atom in record.get("atoms", ())]
    others = {key: value for key, value in record.items() if key not in (*_RESULTS, "features", "atoms")}
    return {"features": record.get("features"), "kept": kept, **others}


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _journals(path: Path) -> list[Path]:
    return sorted(path.glob(f".{RECORD_FILE}.partial*"))


def _remove_journals(path: Path) -> None:
    for journal in _journals(path):
        journal.unlink(missing_ok=True)
