"""The folder of a training run: its settings, progress, checkpoints and results.

| path | holds |
|---|---|
| `run.json` | resolved recipe, data, other files, teacher, versions, git commit |
| `metrics.jsonl` | one line per log step and one per epoch |
| `resume/state.pt` | weights, optimizer, scaler, position in the epoch |
| `resume/state.previous.pt` | the checkpoint before it, in case the last one is damaged |
| `expert/`, `expert-last/` | the best expert by hold-out AUC (see `selection`), and that of the last epoch |
| `run.lock` | locked while a process trains |
| `unreadable.csv` | training and hold-out images that could not be read, if any |
"""

import csv
import json
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from featdistill import atomic
from featdistill.command_line import UserError, counted
from featdistill.records.provenance import Claim, claim, read_record
from featdistill.training.recipe import RUNTIME_KEYS

_log = logging.getLogger(__name__)
# Entries of `run.json` that decide the result.
_DECISIVE = ("stage", "recipe", "data", "files", "teacher")
_STATE, _PREVIOUS = Path("resume/state.pt"), Path("resume/state.previous.pt")


class RunFolder:
    """Access to one run's files. Only the main process writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.expert, self.expert_last = self.path / "expert", self.path / "expert-last"
        self._metrics, self.unreadable_csv = self.path / "metrics.jsonl", self.path / "unreadable.csv"
        self._newest_is_damaged = False

    def claim(self, description: dict[str, Any], resume: str, *, finished: bool = False) -> Claim:
        """Refuse to continue a run with other settings, or to overwrite one; see `provenance.claim`.

        Raises:
            UserError: the folder holds another run; the differences are named.
        """
        recorded = read_record(self.path / "run.json")
        if recorded is None:
            occupied = any((self.path / name).exists() for name in ("resume", "expert", "expert-last"))
            return claim(self.path, None, description, occupied=occupied, remedy="choose another --out")
        if resume == "off":
            raise UserError(
                f"{self.path} already holds a run; choose another --out, or --resume auto to continue it"
            )
        recorded, requested = ({key: run.get(key) for key in _DECISIVE} for run in (recorded, description))
        ignore = ["teacher.path", *(f"recipe.{key}" for key in RUNTIME_KEYS)]
        # A file that has moved is the same file.
        old, new = recorded["files"] or {}, requested["files"] or {}
        ignore += [f"recipe.{key}" for key in new if key in old and old[key]["sha256"] == new[key]["sha256"]]
        remedy = "choose another --out"
        return claim(self.path, recorded, requested, finished=finished, ignore=ignore, remedy=remedy)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from training here; the lock ends with this process, however it ends.

        Raises:
            UserError: another process has locked the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / "run.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another process is training in {self.path}; wait until it ends, or choose another --out"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def start(self, description: dict[str, Any]) -> None:
        """Write `run.json`."""
        atomic.write_json(self.path / "run.json", description)

    def forget(self) -> None:
        """Remove `run.json`: a run that took no step may begin with other settings in the same folder."""
        (self.path / "run.json").unlink(missing_ok=True)

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save_state(self, state: dict[str, Any], *, keep_previous: bool = True) -> None:
        """Write a checkpoint, with the length of the log at this point.

        Args:
            keep_previous: keep the checkpoint before it as well; a finished run needs neither.
        """
        length = self._metrics.stat().st_size if self._metrics.is_file() else 0
        newest, previous = self.path / _STATE, self.path / _PREVIOUS
        with atomic.replace_file(newest) as temporary:
            torch.save(state | {"log_bytes": length}, temporary)
            # Only now that the new checkpoint is complete: if killed in between, the previous one is there.
            if keep_previous and newest.is_file() and not self._newest_is_damaged:
                os.replace(newest, previous)
        self._newest_is_damaged = False
        if not keep_previous:
            previous.unlink(missing_ok=True)

    def load_state(self) -> dict[str, Any] | None:
        """Return the last checkpoint that can be read, or None if there are none.

        Raises:
            UserError: all checkpoints are damaged.
        """
        failure = None
        for path in (self.path / _STATE, self.path / _PREVIOUS):
            if not path.is_file():
                continue
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises many types for a damaged file
                failure = failure or UserError(
                    f"{path} cannot be read ({type(error).__name__}); remove {path.parent} to start afresh"
                )
                continue
            if failure:
                self._newest_is_damaged = True
                _log.warning(
                    "%s cannot be read; continuing from the checkpoint before it", self.path / _STATE
                )
            return state
        if failure:
            raise failure
        return None

    def cut_log(self, length: int) -> None:
        """Drop the lines written after the checkpoint from which the run continues."""
        if self._metrics.is_file():
            os.truncate(self._metrics, min(length, self._metrics.stat().st_size))

    def add_unreadable(self, lines: list[tuple[str, str]]) -> None:
        """Add (image, reason) pairs to `unreadable.csv`, each image once."""
        if lines:
            known = self.unreadable() | dict(lines)
            atomic.write_text(self.unreadable_csv, atomic.csv_text(("image", "reason"), known.items()))

    def unreadable(self) -> dict[str, str]:
        """Return the images that could not be read, and why."""
        if not self.unreadable_csv.is_file():
            return {}
        with self.unreadable_csv.open(encoding="utf-8", newline="") as file:
            return dict(list(csv.reader(file))[1:])

    def report(self) -> int:
        """Log how many images could not be read, and return the exit status: 1 if there are any, else 0."""
        count = len(self.unreadable())
        if count:
            _log.info(f"{counted(count, 'image')} could not be read, listed in {self.unreadable_csv}")
        return 1 if count else 0


def git_commit() -> str | None:
    """Return the commit of this checkout, with `+` if files have changed; None for an installed package."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():  # else git would look in the folders above
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.check_output(command, cwd=checkout, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.SubprocessError):
        return None
