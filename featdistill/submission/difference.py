"""How the scores of a submission differ from the previous one: bad surprises show before the upload."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from featdistill import atomic
from featdistill.records.predictions import match_names, parse_csv, to_numbers
from featdistill.submission.check import CheckedFile, read_members
from featdistill.submission.ledger import read_ledger, slots_of


def differences(ledger: str | Path, files: Sequence[CheckedFile], sha256: str) -> pd.DataFrame:
    """Compare each file with the latest listed submission for the same slot and images.

    Submissions whose zip is gone or was replaced are skipped, and so is the one that is being compared.

    Args:
        sha256: of the submission that `files` belong to.

    Returns:
        One row per file with a previous submission: `slot`; `images`, the number in both, to which all else
        refers; `rank_correlation`, Spearman's, NaN if all scores of one are the same; `mean_absolute`
        difference; `changed_sides`, the share of images on different sides of 0.5; `date` and `file` of the
        previous submission.

    Raises:
        UserError: the ledger is damaged, or a listed zip contains no scores.
    """
    ledger = Path(os.path.realpath(ledger))
    digest = functools.cache(atomic.sha256_of)
    previous = []
    for entry in read_ledger(ledger)[::-1].to_dict("records"):
        archive = ledger.parent / entry["file"]
        if entry["sha256"] != sha256 and archive.is_file() and digest(archive) == entry["sha256"]:
            previous.append((entry, archive))
    rows = []
    for file in files:
        for entry, archive in previous:
            scores = _shared_scores(file, archive, slots_of(entry).get(file.slot))
            if not scores.empty:
                row = {"slot": file.slot, "images": len(scores)}
                row["rank_correlation"] = scores.corr(method="spearman").loc["new", "old"]
                row["mean_absolute"] = (scores["new"] - scores["old"]).abs().mean()
                row["changed_sides"] = ((scores["new"] > 0.5) != (scores["old"] > 0.5)).mean()
                rows.append(row | {"date": entry["date"], "file": entry["file"]})
                break
    return pd.DataFrame(rows)


def _shared_scores(file: CheckedFile, archive: Path, member: str | None) -> pd.DataFrame:
    """Return the scores, `new` and `old`, of the images that a file shares with one in another submission."""
    data = read_members(archive, str(archive)).get(member) if member else None
    rows = parse_csv(data, f"{archive}: {member}")[1] if data else []
    # Names and scores are the last columns in every profile.
    position = match_names(file.names, [row[-2] for row in rows])
    is_shared = position >= 0
    old = to_numbers(row[-1] for row in rows)[position[is_shared]]
    return pd.DataFrame({"new": file.score[is_shared], "old": old})
