"""How the scores of a submission differ from those of the last: a bad surprise shows before the upload."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill import atomic
from featdistill.records.predictions import match_names, parse_csv, to_numbers
from featdistill.submission.check import CheckedFile, read_members
from featdistill.submission.ledger import read_ledger, slots_of


@dataclass(frozen=True)
class Difference:
    """One slot beside the last submission that scored its images.

    Attributes:
        date, file: of the last one, as the ledger has them.
        images: how many both have; the rest is about them.
        rank_correlation: Spearman's, ties by their mean rank; None where all scores of one are the same.
        mean_absolute: mean of |new - old|, scores in [0, 1].
        changed_sides: share of the images that one of the two has above 0.5 and the other has not.
    """

    slot: str
    date: str
    file: str
    images: int
    rank_correlation: float | None
    mean_absolute: float
    changed_sides: float


def differences(ledger: str | Path, files: Sequence[CheckedFile], sha256: str) -> list[Difference]:
    """Compare each file with the last listed submission that has its slot and its images.

    A submission whose zip is gone, or has been replaced by another, is passed over, and so is the one that is
    being compared.

    Args:
        sha256: of the submission that `files` are of.

    Raises:
        UserError: the ledger is damaged, or a listed zip holds no scores.
    """
    ledger = Path(os.path.realpath(ledger))
    _, lines = read_ledger(ledger)
    digest = functools.cache(atomic.sha256_of)
    former = []
    for line in reversed(lines):
        archive = ledger.parent / line["file"]
        if line["sha256"] != sha256 and archive.is_file() and digest(archive) == line["sha256"]:
            former.append((line, archive))
    found = []
    for file in files:
        for line, archive in former:
            member = slots_of(line).get(file.slot)
            data = read_members(archive, str(archive)).get(member) if member else None
            difference = _difference(file, line, data) if data else None
            if difference:
                found.append(difference)
                break
    return found


def _difference(file: CheckedFile, line: dict[str, str], data: bytes) -> Difference | None:
    _, rows = parse_csv(data, line["file"])
    # Names and scores are the last columns of every profile.
    position = match_names(file.names, [row[-2] for row in rows])
    shared = position >= 0
    if not shared.any():
        return None
    new, old = file.score[shared], to_numbers(row[-1] for row in rows)[position[shared]]
    return Difference(
        slot=file.slot,
        date=line["date"],
        file=line["file"],
        images=len(new),
        rank_correlation=_rank_correlation(new, old),
        mean_absolute=float(np.abs(new - old).mean()),
        changed_sides=float(((new > 0.5) != (old > 0.5)).mean()),
    )


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    ranks = [pd.Series(values).rank().to_numpy() for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])
