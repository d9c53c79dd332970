"""The folder of a training run: what was asked for, how it goes, what a killed run needs, what came out.

| path | holds |
|---|---|
| `run.json` | resolved recipe, data, teacher, versions, git commit |
| `metrics.jsonl` | a line a log step and a line an epoch |
| `resume/state.pt` | weights, optimiser, schedule, scaler, place in the epoch |
| `resume/state.previous.pt` | the checkpoint before it, for the case that it is damaged |
| `expert/`, `expert-last/` | the best expert by hold-out robust AUC, and that of the last epoch |
| `unreadable.csv` | training images that could not be read, where there are any |
"""

import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.training import recipe as recipes

_STATE, _PREVIOUS = Path("resume/state.pt"), Path("resume/state.previous.pt")


class RunFolder:
    """Access to one run's files. Only the main process writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.expert, self.expert_last = self.path / "expert", self.path / "expert-last"
        self._log = self.path / "metrics.jsonl"
        self._newest_is_damaged = False

    def describe(self) -> dict[str, Any] | None:
        """Return the content of `run.json`, or None where there is no run."""
        path = self.path / "run.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def check(self, description: dict[str, Any], resume: str) -> None:
        """Refuse to continue a run with other settings, or to write over one.

        Raises:
            UserError: the folder holds another run; the differences are named.
        """
        former = self.describe()
        if former is None:
            return
        if resume == "off":
            raise UserError(
                f"{self.path} already holds a run; give another --out, or --resume auto to continue it"
            )
        changed = recipes.differences(former["recipe"], description["recipe"])
        changed += [
            f"{key} changed" for key in ("data", "teacher") if former.get(key) != description.get(key)
        ]
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings ({'; '.join(changed)}); give another --out"
            )

    def start(self, description: dict[str, Any]) -> None:
        """Write `run.json`."""
        atomic.write_json(self.path / "run.json", description)

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save_state(self, state: dict[str, Any], *, keep_previous: bool = True) -> None:
        """Write a checkpoint, with the length of the log that belongs to it.

        Args:
            keep_previous: keep the checkpoint before it as well; a finished run needs neither.
        """
        length = self._log.stat().st_size if self._log.is_file() else 0
        newest, previous = self.path / _STATE, self.path / _PREVIOUS
        with atomic.replace_file(newest) as beside:
            torch.save(state | {"log_bytes": length}, beside)
            # Moved aside only now that the new one is whole: a kill in between leaves the former one.
            if keep_previous and newest.is_file() and not self._newest_is_damaged:
                os.replace(newest, previous)
        self._newest_is_damaged = False
        if not keep_previous:
            previous.unlink(missing_ok=True)

    def load_state(self) -> dict[str, Any] | None:
        """Return the last checkpoint that can be read, or None where there is none.

        Raises:
            UserError: all that there are are damaged.
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
                print(f"{self.path / _STATE} cannot be read; continuing from the checkpoint before it")
            return state
        if failure:
            raise failure
        return None

    def cut_log(self, length: int) -> None:
        """Drop the lines that were written after the checkpoint from which the run continues."""
        if self._log.is_file():
            os.truncate(self._log, min(length, self._log.stat().st_size))

    def add_unreadable(self, lines: list[tuple[str, str]]) -> None:
        """Add (image, reason) pairs to `unreadable.csv`, each image once."""
        path = self.path / "unreadable.csv"
        known = {}
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                known = dict(list(csv.reader(file))[1:])
        atomic.write_text(path, atomic.csv_text(("image", "reason"), (known | dict(lines)).items()))


def git_commit() -> str | None:
    """Return the commit of the code that runs, with `+` where files were changed; None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")
