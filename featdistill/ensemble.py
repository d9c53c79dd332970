"""Scores of many experts over many images: decode once, score with all, fuse; go on where one stopped."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from featdistill import atomic
from featdistill.command_line import progress
from featdistill.dataset import Broken, ScoreDataset, make_loader
from featdistill.distortion_policy import DistortionPolicy
from featdistill.equalise import Equalisation
from featdistill.experts import Expert

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ScoredBatch:
    """What the experts say of one batch.

    Attributes:
        number: of the batch in the order of the rows.
        rows: positions of the N scored rows.
        logits: (experts, N) float32.
        broken: the rows of the batch whose images could not be read.
    """

    number: int
    rows: list[int]
    logits: np.ndarray
    broken: list[Broken]


def score(
    experts: Sequence[Expert],
    rows: pd.DataFrame,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    workers: int = 0,
    precision: str = "fp32",
    policy: DistortionPolicy | None = None,
    seed: int = 0,
    equalisation: Equalisation | None = None,
    batches: Sequence[int] | None = None,
) -> Iterator[ScoredBatch]:
    """Score rows of a manifest batch by batch.

    Which images share a batch depends on `batch_size` alone, so that a continued run gives the same numbers.

    Args:
        experts: in evaluation mode, on `device`.
        policy: distorts each image as (seed, name) says before it is scored.
        equalisation: see `TrainDataset`.
        batches: numbers of the batches wanted; all by default.
    """
    keys = [expert.preprocessing.key for expert in experts]
    dataset = ScoreDataset(rows, keys, policy, seed, equalisation)
    count = -(-len(rows) // batch_size)
    numbers = list(range(count)) if batches is None else list(batches)
    items = [
        list(range(number * batch_size, min(len(rows), (number + 1) * batch_size))) for number in numbers
    ]
    device = torch.device(device)
    for number, batch in zip(numbers, make_loader(dataset, items, workers), strict=True):
        logits = np.zeros((len(experts), 0), np.float32)
        if "images" in batch:
            images = {key: value.to(device, non_blocking=True) for key, value in batch["images"].items()}
            with torch.inference_mode(), autocast(device, precision):
                found = [expert(images[expert.preprocessing.key]) for expert in experts]
            logits = torch.stack(found).float().cpu().numpy()
        yield ScoredBatch(
            number, batch["index"].tolist() if "index" in batch else [], logits, batch["broken"]
        )


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context in which a forward pass has the given precision."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision])


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return P(AI) of logits in float64: in float32 every logit above 17 gives 1, and they all tie."""
    positive = np.exp(-np.abs(logits.astype(np.float64)))
    return np.where(logits >= 0, 1, positive) / (1 + positive)


def fuse(expert_probabilities: np.ndarray) -> np.ndarray:
    """Average the experts' probabilities (paper, eq. 3): (experts, N) -> (N,)."""
    return expert_probabilities.mean(axis=0)


class PartialScores:
    """The scores of a run under way, a line a batch, so that a killed run loses at most one batch.

    The first line says what is being scored; a file that says otherwise is not continued but started afresh.
    """

    def __init__(self, path: Path, what: dict[str, Any]) -> None:
        self.path, self.batches = path, []
        header = json.dumps(what, sort_keys=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        # A line without its end is what a kill in the middle of writing leaves.
        whole = [line for line in lines if line.endswith(b"\n")]
        if whole and whole[0].decode() == header + "\n":
            self.batches = [_parse_batch(line) for line in whole[1:]]
        else:
            whole = [f"{header}\n".encode()]
        # Beside and renamed: a second kill must not cost what the first one left.
        with atomic.replace_file(path) as beside:
            beside.write_bytes(b"".join(whole))

    def append(self, batch: ScoredBatch) -> None:
        """Add a batch and bring it to the disk."""
        self.batches.append(batch)
        line = json.dumps([batch.number, batch.rows, batch.logits.tolist(), batch.broken])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def remove(self) -> None:
        """Drop the file: the finished predictions have taken its place."""
        self.path.unlink(missing_ok=True)


def score_resumably(
    experts: Sequence[Expert], rows: pd.DataFrame, partial: PartialScores, what: str, **settings: Any
) -> tuple[np.ndarray, list[Broken]]:
    """Score all rows, going on from what `partial` holds.

    Args:
        what: shown beside the bar.
        settings: see `score`.

    Returns:
        Logits (experts, rows) float32, NaN where the image could not be read, and the broken rows in order.
    """
    done = {batch.number for batch in partial.batches}
    count = -(-len(rows) // settings["batch_size"])
    missing = [number for number in range(count) if number not in done]
    scored = sum(len(batch.rows) + len(batch.broken) for batch in partial.batches)
    with progress(len(rows), what, initial=scored) as bar:
        for batch in score(experts, rows, batches=missing, **settings):
            partial.append(batch)
            bar.update(len(batch.rows) + len(batch.broken))
    logits = np.full((len(experts), len(rows)), np.nan, np.float32)
    for batch in partial.batches:
        logits[:, batch.rows] = batch.logits
    return logits, sorted(broken for batch in partial.batches for broken in batch.broken)


def _parse_batch(line: bytes) -> ScoredBatch:
    number, rows, logits, broken = json.loads(line)
    return ScoredBatch(number, rows, np.array(logits, np.float32), [Broken(*item) for item in broken])
