"""Outputs that a killed run continues: it loses no more than the batches under way.

Each process appends to a journal next to the output: for `val.csv` it is `.val.csv.partial`, or with several
processes `.val.csv.partial.RANK-of-WORLD`. The first line says what the output is made from; then there is
one line per batch: its number, the logits as base64 of float32 (exact and short), and the broken rows. All
journals are read at the start, so any number of processes can continue. Journals of other settings are
ignored, and removed when the output is finished.
"""

import base64
import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from featdistill import atomic
from featdistill.command_line import progress
from featdistill.inference.compute import full_memory_is_an_error
from featdistill.inference.predictor import Predictor
from featdistill.inference.scoring import ScoredBatch, score_dataset
from featdistill.records.provenance import Claim, claim


class PartialScores:
    """The scores known so far, and the journal to which this process adds.

    Args:
        out: path of the output.
        sidecar: what it is made from; its `batch_size` decides which rows form a batch.
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

    def missing(self) -> list[int]:
        """Return the numbers of the batches that are not scored yet."""
        return np.flatnonzero(~self.done).tolist()

    def batch_rows(self, number: int) -> range:
        """Return the rows of a batch."""
        return range(self.logits.shape[1])[number * self.batch_size : (number + 1) * self.batch_size]

    def append(self, batch: ScoredBatch) -> None:
        """Add a batch, and hand it to the system, so that it survives a kill of this process."""
        logits = base64.b64encode(np.ascontiguousarray(batch.logits, "<f4").tobytes()).decode()
        line = json.dumps([batch.number, logits, batch.broken]).encode() + b"\n"
        with self.path.open("ab") as file:
            file.write(line)
        self._add(line)

    def refresh(self) -> None:
        """Read what all journals contain now."""
        for path in journals(self.out):
            with path.open("rb") as file:
                if file.readline() == self._header:
                    for line in file:
                        self._add(line)

    def remove(self) -> None:
        """Remove all journals, once the finished output replaces them."""
        for path in journals(self.out):
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


def claim_scores(
    predictor: Predictor,
    out: Path,
    requested: dict[str, Any],
    recorded: dict[str, Any] | None,
    rows: pd.DataFrame,
    ignore: Sequence[str] = (),
) -> tuple[Claim, dict[str, Any]]:
    """Return how much there is of an output, and what it is made from, with no setting left open.

    Args:
        requested: what it would be made from now.
        recorded: what it was made from; None without a record.
        rows: what will be scored.
        ignore: as in `claim`.
    """
    exists, headers = out.is_file(), [header for header in map(_header, journals(out)) if header]
    finished = recorded is not None and exists
    if recorded is None:
        recorded = next((made for made in headers if predictor.settle(requested, made) == made), None)
    settled = predictor.settle(requested, recorded)
    state = claim(out, recorded, settled, finished=finished, occupied=exists and not headers, ignore=ignore)
    if state is Claim.NEW:
        with full_memory_is_an_error():
            settled |= predictor.decide(rows)
    return state, settled


def score_resumably(
    predictor: Predictor,
    dataset: Dataset,
    partial: PartialScores,
    title: str,
    batches: Sequence[int] | None = None,
    *,
    show: bool = True,
) -> None:
    """Score batches and add each to `partial`.

    Args:
        title: of the progress bar, shown if `show`.
        batches: their numbers; by default all that are missing.
    """
    batches = partial.missing() if batches is None else batches
    if not batches:
        return
    done, todo = (
        sum(len(partial.batch_rows(number)) for number in numbers)
        for numbers in (np.flatnonzero(partial.done).tolist(), batches)
    )
    settings = predictor.settings() | {"batch_size": partial.batch_size, "batches": batches}
    with full_memory_is_an_error(), progress(done + todo, title, initial=done, show=show) as bar:
        models = predictor.models(partial.sidecar["precision"], partial.batch_size)
        for batch in score_dataset(models, dataset, **settings):
            partial.append(batch)
            bar.update(len(partial.batch_rows(batch.number)))


def journal_path(out: Path, rank: int = 0, world: int = 1) -> Path:
    """Return the journal of one of the processes that make an output."""
    return out.with_name(f".{out.name}.partial" + (f".{rank}-of-{world}" if world > 1 else ""))


def journals(out: Path) -> list[Path]:
    """Return the journals of all processes that make an output."""
    return sorted(out.parent.glob(f".{glob.escape(out.name)}.partial*"))


def _header(journal: Path) -> dict[str, Any] | None:
    """Return what an output is made from according to a journal, or None if that cannot be read."""
    with journal.open("rb") as file:
        try:
            header = json.loads(file.readline())
        except ValueError:
            return None
    return header if isinstance(header, dict) else None
