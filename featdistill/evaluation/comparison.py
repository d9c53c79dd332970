"""Which of several runs is better, and is the difference beyond chance? Paired, over the images all scored.

Runs that score the same images share most of what chance does to them, so the interval of their difference is
far narrower than their two intervals suggest. A difference is beyond chance if its 95 % interval excludes 0.
Pairs are not corrected for their number: of twenty pairs of equal runs, expect one to seem different.
"""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill.command_line import UserError
from featdistill.evaluation.intervals import METHOD, auc_bounds, auc_covariance, difference_bounds
from featdistill.evaluation.metrics import parts_of, roc_auc
from featdistill.records.labels import label_rows, read_labels, source_of
from featdistill.records.predictions import read_predictions

# Runs are ranked by the first, ties by the next.
METRICS = ("robust_auc", "clean_auc", "auc")


def compare(predictions: list[str], labels: str | None = None) -> dict:
    """Rank runs by robust AUC, then by clean AUC, over the images that all of them scored.

    Args:
        predictions: two or more files.
        labels: the label file, or None for the manifest that the first sidecar names.

    Returns:
        `images`, how many are compared; `left_out`, labeled ones that some run did not score; `intervals`:
        how they were computed; `runs`, best first: `name`, `METRICS`, `intervals`; `differences` of each pair
        and metric: `first`, `second`, `metric`, `difference` (first - second), `low`, `high`,
        `beyond_chance` (None where it is not defined); `n`: metric -> number of images.

    Raises:
        UserError: fewer than two files, a name that is not in the labels, or no image that all scored.
    """
    if len(predictions) < 2:
        raise UserError("a comparison needs two predictions files or more")
    if len({Path(path).resolve() for path in predictions}) < len(predictions):
        raise UserError("a predictions file is named twice")
    truth = read_labels(source_of(predictions[0], labels))
    names = run_names(predictions)
    scores = np.full((len(names), len(truth)), np.nan)
    for row, path in zip(scores, predictions, strict=True):
        frame = read_predictions(path)
        row[label_rows(frame, truth)] = frame["score"]
    known = (truth["label"] >= 0).to_numpy()
    rows = known & np.isfinite(scores).all(axis=0)
    if not rows.any():
        raise UserError("no image has a label and a score of every run")
    # Sorted by name: the order of the label file's rows must not change the last digits.
    order = np.flatnonzero(rows)[np.argsort(truth["name"].to_numpy(dtype=str)[rows], kind="stable")]
    result = _compare(truth.iloc[order], names, scores[:, order])
    left_out = int(known.sum()) - len(order)
    return {"images": len(order), "left_out": left_out, "intervals": METHOD, **result}


def run_names(paths: list[str]) -> list[str]:
    """Return the shortest ends of the paths, without extension, that distinguish the runs."""
    parts = [Path(path).absolute().with_suffix("").parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _compare(truth: pd.DataFrame, names: list[str], scores: np.ndarray) -> dict:
    label = truth["label"].to_numpy()
    parts = parts_of(truth["is_distorted"].to_numpy(), len(label))
    parts = {metric: parts[metric] for metric in METRICS}
    runs = [
        {"name": name} | {metric: roc_auc(label[rows], score[rows]) for metric, rows in parts.items()}
        for name, score in zip(names, scores, strict=True)
    ]
    # Ranked before anything is computed of pairs, so the order of the files changes nothing.
    ranked = sorted(
        range(len(runs)), key=lambda run: [*(-(runs[run][metric] or 0.0) for metric in parts), names[run]]
    )
    runs, scores = [runs[run] | {"intervals": {}} for run in ranked], scores[ranked]
    differences = []
    for metric, rows in parts.items():
        covariance = auc_covariance(label[rows], scores[:, rows])
        for run, variance in zip(runs, np.diag(covariance), strict=True):
            run["intervals"][metric] = list(auc_bounds(run[metric], variance))
        for one, other in combinations(range(len(runs)), 2):
            first, second = runs[one], runs[other]
            difference = None if first[metric] is None else first[metric] - second[metric]
            variance = covariance[one, one] + covariance[other, other] - 2 * covariance[one, other]
            low, high = difference_bounds(difference, variance)
            pair = {"first": first["name"], "second": second["name"], "metric": metric}
            pair |= {"difference": difference, "low": low, "high": high}
            pair["beyond_chance"] = None if low is None else low > 0 or high < 0
            differences.append(pair)
    counts = {metric: int(rows.sum()) for metric, rows in parts.items()}
    return {"runs": runs, "differences": differences, "n": counts}
