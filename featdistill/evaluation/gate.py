"""Is a run worse than a kept one, in any category? For whoever releases a new expert.

A baseline holds names, labels and scores of the images of a run, so it needs no other file. Each category is
compared by the AUCs of both runs over the same images, with DeLong's paired variance. A category fails if its
AUC fell by more than the margin and the fall is beyond chance: one-sided tests, with Holm's correction for
the number of categories (Scandinavian Journal of Statistics 6, 1979). So of releases that are as good as the
baseline, at most one in twenty is stopped, however many categories there are.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtr

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.evaluation.intervals import difference_bounds
from featdistill.evaluation.splits import Split
from featdistill.evaluation.stratified import aucs
from featdistill.records.predictions import name_list
from featdistill.records.provenance import check_replaceable, read_record
from featdistill.records.strata import column_strata
from featdistill.text_tables import number, table

FORMAT = "featdistill baseline"
FORMAT_VERSION = 1
# The chance that a run as good as the baseline is stopped, over all categories.
LEVEL = 0.05
# Categories with fewer images are shown and not tested: the normal approximation is too rough for them.
MIN_IMAGES = 20
MARGIN = 0.02
# The exit status of a run that is worse.
STATUS = 4


def write_baseline(path: str | Path, splits: Sequence[Split]) -> None:
    """Keep the scores of a run; a file that is not a baseline is not replaced.

    Raises:
        UserError: there is another file.
    """
    check_replaceable(path, FORMAT, "choose another name for --keep-baseline")
    kept = {
        split.name: {
            "names": split.frame["name"].tolist(),
            "labels": split.frame["label"].tolist(),
            "scores": split.frame["score"].tolist(),
        }
        for split in splits
        if not split.frame.empty
    }
    atomic.write_json(path, {"format": FORMAT, "version": FORMAT_VERSION, "splits": kept})


def read_baseline(path: str | Path) -> dict[str, pd.DataFrame]:
    """Return for each split of a baseline a frame with `name`, `label` and `score`.

    Raises:
        UserError: it is missing, of another kind or version, or damaged.
    """
    remedy = "keep one with evaluate.py --keep-baseline"
    record = read_record(path, remedy, format=FORMAT, version=FORMAT_VERSION)
    if record is None:
        raise UserError(f"baseline {path} does not exist; {remedy}")
    try:
        frames = {}
        for name, kept in record["splits"].items():
            frame = pd.DataFrame({one: kept[f"{one}s"] for one in ("name", "label", "score")})
            frame["score"] = frame["score"].astype(np.float64)
            if not (frame["label"].isin((0, 1)).all() and np.isfinite(frame["score"]).all()):
                raise ValueError(f"labels or scores of {name} are out of range")
            frames[name] = frame
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"baseline {path} is damaged ({error}); {remedy}") from error
    return frames


def compare(
    splits: Sequence[Split], baseline: str | Path, by: Sequence[str] = (), margin: float = MARGIN
) -> dict:
    """Compare a run with a baseline, over all images of each split and category by category.

    Args:
        splits: with the columns of `by`.
        by: columns of the labels; each value of each column is a category. A category with images of only one
            class is compared with all images of the other class, as in breakdowns.
        margin: how far an AUC may fall.

    Returns:
        `baseline`, `margin`, `level`, `rows`: `split`, `category`, `real`, `ai`, `baseline_auc`, `auc`,
        `difference` with its 95 % interval `low` and `high`, `p` (after Holm's correction; None if it was not
        tested) and `is_worse`; and `worse`, the names of the categories that are.

    Raises:
        UserError: the baseline cannot be read, or was over other splits or images.
    """
    kept = read_baseline(baseline)
    splits = [split for split in splits if not split.frame.empty]
    if {split.name for split in splits} != kept.keys():
        raise UserError(
            f"{baseline} has the splits {', '.join(kept)}, this run has "
            f"{', '.join(split.name for split in splits)}; compare runs over the same splits"
        )
    rows = [
        row for split in splits for row in _rows(split, _scores_of(split, kept[split.name], baseline), by)
    ]
    adjusted = holm([row["p"] for row in rows])
    for row, p in zip(rows, adjusted, strict=True):
        row["p"] = p
        row["is_worse"] = p is not None and p < LEVEL and row["difference"] < -margin
    worse = [f"{row['split']}: {row['category']}" for row in rows if row["is_worse"]]
    return {"baseline": str(baseline), "margin": margin, "level": LEVEL, "rows": rows, "worse": worse}


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Return p-values after Holm's correction; those that are None do not count."""
    order = sorted((row for row, p in enumerate(values) if p is not None), key=lambda row: values[row])
    result: list[float | None] = [None] * len(values)
    largest = 0.0
    for place, row in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * values[row]))
        result[row] = largest
    return result


def markdown(result: dict) -> str:
    """Return the table of `compare`, and what it means."""
    rows = [
        [
            f"{row['split']}: {row['category']}",
            f"{row['real']:,}",
            f"{row['ai']:,}",
            number(row["baseline_auc"]),
            number(row["auc"]),
            "n/a" if row["difference"] is None else f"{row['difference']:+.4f}",
            "" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}",
            "not tested" if row["p"] is None else f"{row['p']:.3g}",
            "WORSE" if row["is_worse"] else "",
        ]
        for row in result["rows"]
    ]
    header = ["category", "real", "AI", "baseline AUC", "AUC", "difference", "95 %", "p (Holm)", ""]
    margin = f"fell by more than {result['margin']:g}, beyond chance"
    verdict = f"The AUC {margin}, in: {'; '.join(result['worse'])}." if result["worse"] else ""
    return "\n\n".join(["# Gate", table(header, rows), verdict or f"No AUC {margin}."]) + "\n"


def csv_rows(result: dict) -> Iterator[tuple]:
    """Yield rows of `tables.CSV_HEADER`: the difference of each category."""
    for row in result["rows"]:
        name, bounds = f"gate/{row['category']}", (row["low"], row["high"])
        yield row["split"], name, row["difference"], *bounds, row["real"] + row["ai"]


def _scores_of(split: Split, kept: pd.DataFrame, baseline: str | Path) -> np.ndarray:
    """Return the baseline's score of each image of a split."""
    ours, theirs = split.frame["name"], kept["name"]
    other = [*ours[~ours.isin(theirs)], *theirs[~theirs.isin(ours)]]
    if other:
        raise UserError(
            f"{split.name} and {baseline} are over different images ({len(other)} are in one of them only): "
            f"{name_list(other)}; score the same images, or keep a new baseline"
        )
    kept = kept.set_index("name").loc[ours]
    changed = ours[kept["label"].to_numpy() != split.frame["label"].to_numpy()]
    if len(changed):
        raise UserError(
            f"{split.name} and {baseline} have different labels ({len(changed)}): {name_list(changed)}; keep "
            "a new baseline"
        )
    return kept["score"].to_numpy(np.float64)


def _rows(split: Split, before: np.ndarray, by: Sequence[str]) -> Iterator[dict]:
    frame = split.frame
    label, after = frame["label"].to_numpy(), frame["score"].to_numpy(np.float64)
    real, ai = np.flatnonzero(label == 0), np.flatnonzero(label == 1)
    categories = {"all images": np.arange(len(label))}
    for column in by:
        cells = pd.DataFrame({column: frame[f"column {column}"]})
        strata = column_strata(cells, column, f"{split.labels} (images of {split.name})")
        categories |= {
            f"{column} {name}": np.flatnonzero(strata.cat.codes == code)
            for code, name in enumerate(strata.cat.categories)
        }
    for name, own in categories.items():
        other = real if (label[own] == 1).all() else ai if (label[own] == 0).all() else own[:0]
        rows = np.concatenate([own, other])
        scores = np.stack([after[rows], before[rows]])
        (auc, before_auc), covariance = aucs(label[rows], scores)
        difference = None if auc is None else auc - before_auc
        variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        low, high = difference_bounds(difference, variance)
        p = None
        if low is not None and len(own) >= MIN_IMAGES:
            deviation = math.sqrt(max(variance, 0.0))
            p = float(ndtr(difference / deviation)) if deviation else float(difference >= 0)
        yield {
            "split": split.name,
            "category": name,
            "real": int((label[rows] == 0).sum()),
            "ai": int((label[rows] == 1).sum()),
            "baseline_auc": before_auc,
            "auc": auc,
            "difference": difference,
            "low": low,
            "high": high,
            "p": p,
        }
