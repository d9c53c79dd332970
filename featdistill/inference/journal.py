"""The scores of a run under way, so that a killed run loses at most the batches it was at.

Each process writes a journal beside the predictions: for `val.csv` it is `.val.csv.partial`, or of several
processes `.val.csv.partial.RANK-of-WORLD`. Its first line is the sidecar of the predictions to be; then comes
a line a batch: number, logits as base64 of float32 (exact and short), and the broken rows. Every process
reads all journals at its start, whoever wrote them, so that a run may be continued by another number of
processes; journals with another first line are left alone and go when the predictions are finished.
"""

import base64
import glob
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from featdistill import atomic
from featdistill.command_line import progress
from featdistill.data.loading import Broken
from featdistill.inference.processes import Process, wait_for
from featdistill.inference.scoring import ScoredBatch, score_dataset
from featdistill.models.expert import Expert

# How often the main process looks at what the others have done.
_LOOK_EVERY_S = 2.0


class PartialScores:
    """What is known of the scores of all rows, and the journal in which this process adds to it.

    Args:
        out: the predictions to be.
        what: their sidecar, of which `batch_size` decides which rows make a batch.
        experts: how many there are.
        rows: how many there are.

    Attributes:
        logits: (experts, rows) float32, NaN where a row is not scored yet or broken.
        broken: row -> why its image could not be read.
        done: (batches,) bool.
    """

    def __init__(
        self, out: Path, what: dict[str, Any], experts: int, rows: int, process: Process | None = None
    ) -> None:
        self.out, self.process, self.batch_size = out, process or Process(), what["batch_size"]
        self.path = journal_path(out, self.process)
        self.logits = np.full((experts, rows), np.nan, np.float32)
        self.broken: dict[int, str] = {}
        self.done = np.zeros(-(-rows // self.batch_size), bool)
        self.scored = 0
        self._header = json.dumps(what, sort_keys=True).encode() + b"\n"
        self._read: dict[Path, int] = {}
        self.refresh()
        if self.path in self._read:
            # Behind the last whole line there may be a part of one.
            os.truncate(self.path, self._read[self.path])
        else:
            with atomic.replace_file(self.path) as beside:
                beside.write_bytes(self._header)

    @property
    def is_complete(self) -> bool:
        return bool(self.done.all())

    def missing(self) -> list[int]:
        """Return the numbers of the batches that this process has still to score."""
        mine = np.arange(self.process.rank, len(self.done), self.process.world)
        return mine[~self.done[mine]].tolist()

    def append(self, batch: ScoredBatch) -> None:
        """Add a batch and hand it to the system, from which no kill takes it back."""
        logits = base64.b64encode(np.ascontiguousarray(batch.logits, "<f4").tobytes()).decode()
        line = json.dumps([batch.number, logits, batch.broken]).encode() + b"\n"
        with self.path.open("ab") as file:
            file.write(line)
        self._take(line)

    def refresh(self) -> None:
        """Take in what the other processes' journals have got since the last time."""
        for path in _journals(self.out):
            if path != self.path or path not in self._read:
                self._read_journal(path)

    def remove(self) -> None:
        """Remove all journals: the finished predictions have taken their place."""
        for path in _journals(self.out):
            path.unlink(missing_ok=True)

    def _read_journal(self, path: Path) -> None:
        start = self._read.get(path, 0)
        try:
            with path.open("rb") as file:
                if start == 0 and file.readline() != self._header:
                    return
                end = start = start or len(self._header)
                file.seek(start)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._take(line)
                    end += len(line)
        except FileNotFoundError:  # the main process has finished in the meantime
            return
        self._read[path] = end

    def _take(self, line: bytes) -> None:
        try:
            number, text, broken = json.loads(line)
            logits = np.frombuffer(base64.b64decode(text), "<f4").reshape(len(self.logits), -1)
            reasons = dict(broken)
            first = number * self.batch_size
            batch = range(first, min(first + self.batch_size, self.logits.shape[1]))
            rows = [row for row in batch if row not in reasons]
            if self.done[number]:
                return
            self.logits[:, rows] = logits
        except (ValueError, TypeError, IndexError):  # damaged on the disk: the batch is scored again
            return
        self.broken |= reasons
        self.done[number] = True
        self.scored += len(batch)


def journal_path(out: Path, process: Process) -> Path:
    """Return the journal of one of the processes that make the predictions `out`."""
    several = f".{process.rank}-of-{process.world}" if process.world > 1 else ""
    return out.with_name(f".{out.name}.partial{several}")


def journal_headers(out: Path) -> dict[Path, dict[str, Any]]:
    """Return the sidecar in the first line of each journal of `out`."""
    found = {}
    for path in _journals(out):
        try:
            with path.open("rb") as file:
                header = json.loads(file.readline())
        except (FileNotFoundError, ValueError):  # finished in the meantime, or no journal of ours
            continue
        if isinstance(header, dict):
            found[path] = header
    return found


def score_resumably(
    experts: Sequence[Expert], dataset: Dataset, partial: PartialScores, what: str, **settings: Any
) -> list[Broken]:
    """Score what `partial` lacks of this process's part; the main process then waits for the others.

    Args:
        what: shown beside the bar.
        settings: see `ensemble.score_dataset`.

    Returns:
        The broken rows known, in order; in the main process all of them. The scores are in `partial.logits`.

    Raises:
        UserError: the other processes have fallen silent.
    """
    process, looked = partial.process, time.monotonic()
    settings["batch_size"] = partial.batch_size
    with progress(len(dataset), what, initial=partial.scored, show=process.is_main) as bar:
        missing = partial.missing()
        for batch in score_dataset(experts, dataset, batches=missing, **settings) if missing else ():
            partial.append(batch)
            if process.world > 1 and process.is_main and time.monotonic() - looked > _LOOK_EVERY_S:
                partial.refresh()
                looked = time.monotonic()
            bar.update(partial.scored - bar.n)

        def all_there() -> bool | None:
            partial.refresh()
            bar.update(partial.scored - bar.n)
            return partial.is_complete or None

        if process.is_main:
            wait_for(all_there, "the scores of the others", sign_of_life=lambda: partial.scored)
    return [Broken(row, partial.broken[row]) for row in sorted(partial.broken)]


def _journals(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f".{glob.escape(out.name)}.partial*"))
