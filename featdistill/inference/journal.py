"""The scores of an unfinished run, so that a killed run loses no more than the batches under way.

Each process appends to a journal next to the predictions: for `val.csv` it is `.val.csv.partial`, or with
several processes `.val.csv.partial.RANK-of-WORLD`. The first line is the sidecar of the predictions; then
there is one line per batch: its number, the logits as base64 of float32 (exact and short), and the broken
rows. All journals are read at the start, so a run can be continued by another number of processes. Journals
of other settings are ignored, and removed once the predictions are finished.
"""

import base64
import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from featdistill import atomic
from featdistill.command_line import progress
from featdistill.inference.scoring import ScoredBatch, score_dataset


class PartialScores:
    """The scores known so far, and the journal to which this process adds.

    Args:
        out: path of the predictions.
        sidecar: what the predictions are made from; its `batch_size` decides which rows form a batch.
        experts, rows: how many there are.
        rank, world: which of how many processes this is.

    Attributes:
        logits: (experts, rows) float32, NaN if a row is not scored yet or broken.
        broken: row -> why its image could not be read.
        done: (batches,) bool.
    """

    def __init__(
        self, out: Path, sidecar: dict[str, Any], experts: int, rows: int, rank: int = 0, world: int = 1
    ) -> None:
        self.out, self.sidecar, self.batch_size = out, sidecar, sidecar["batch_size"]
        self.path = journal_path(out, rank, world)
        self.logits = np.full((experts, rows), np.nan, np.float32)
        self.broken: dict[int, str] = {}
        self.done = np.zeros(-(-rows // self.batch_size), bool)
        self._header = json.dumps(sidecar, sort_keys=True).encode() + b"\n"
        self.refresh()
        content = self.path.read_bytes() if self.path.is_file() else b""
        if not content.startswith(self._header):
            with atomic.replace_file(self.path) as temporary:
                temporary.write_bytes(self._header)
        elif not content.endswith(b"\n"):
            # A kill left part of a line, which the next one must not continue.
            with self.path.open("ab") as file:
                file.write(b"\n")

    @property
    def is_complete(self) -> bool:
        return bool(self.done.all())

    def missing(self) -> list[int]:
        """Return the numbers of the batches that are not scored yet."""
        return np.flatnonzero(~self.done).tolist()

    def batch_rows(self, number: int) -> range:
        """Return the rows of a batch."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.logits.shape[1]))

    def append(self, batch: ScoredBatch) -> None:
        """Add a batch, and hand it to the system, so that it survives a kill of this process."""
        logits = base64.b64encode(np.ascontiguousarray(batch.logits, "<f4").tobytes()).decode()
        line = json.dumps([batch.number, logits, batch.broken]).encode() + b"\n"
        with self.path.open("ab") as file:
            file.write(line)
        self._add(line)

    def refresh(self) -> None:
        """Read what all journals hold now."""
        for path in _journals(self.out):
            with path.open("rb") as file:
                if file.readline() == self._header:
                    for line in file:
                        self._add(line)

    def remove(self) -> None:
        """Remove all journals, once the finished predictions replace them."""
        for path in _journals(self.out):
            path.unlink(missing_ok=True)

    def _add(self, line: bytes) -> None:
        try:
            number, text, broken = json.loads(line)
            if self.done[number]:
                return
            logits = np.frombuffer(base64.b64decode(text), "<f4").reshape(len(self.logits), -1)
            reasons = dict(broken)
            self.logits[:, [row for row in self.batch_rows(number) if row not in reasons]] = logits
        except (ValueError, TypeError, IndexError):  # cut short or damaged: the batch is scored again
            return
        self.broken |= reasons
        self.done[number] = True


def journal_path(out: Path, rank: int = 0, world: int = 1) -> Path:
    """Return the journal of one of the processes that make the predictions `out`."""
    suffix = f".{rank}-of-{world}" if world > 1 else ""
    return out.with_name(f".{out.name}.partial{suffix}")


def journal_headers(out: Path) -> dict[Path, dict[str, Any]]:
    """Return the sidecar in the first line of each journal of `out`."""
    headers = {}
    for path in _journals(out):
        with path.open("rb") as file:
            try:
                header = json.loads(file.readline())
            except ValueError:  # damaged: it cannot be continued
                continue
        if isinstance(header, dict):
            headers[path] = header
    return headers


def score_resumably(
    experts: Sequence[nn.Module],
    dataset: Dataset,
    partial: PartialScores,
    title: str,
    *,
    batches: Sequence[int] | None = None,
    show: bool = True,
    **settings: Any,
) -> None:
    """Score batches and add each to `partial`.

    Args:
        title: of the progress bar.
        batches: their numbers; by default all that are missing.
        show: whether to show the bar.
        settings: see `scoring.score_dataset`.
    """
    batches = partial.missing() if batches is None else batches
    done = sum(len(partial.batch_rows(number)) for number in np.flatnonzero(partial.done))
    total = done + sum(len(partial.batch_rows(number)) for number in batches)
    settings["batch_size"] = partial.batch_size
    with progress(total, title, initial=done, show=show) as bar:
        for batch in score_dataset(experts, dataset, batches=batches, **settings) if batches else ():
            partial.append(batch)
            bar.update(len(partial.batch_rows(batch.number)))


def _journals(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f".{glob.escape(out.name)}.partial*"))
