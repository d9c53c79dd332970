"""Which of several runs is better, and is it more than chance? A paired bootstrap over the images all scored.

Two runs see the same images, so most of what chance does to one it does to the other: the interval of the
difference is far narrower than the two intervals suggest. A difference is beyond chance where its 95 %
interval leaves out 0. Each pair is looked at by itself; of twenty equal pairs one will seem different.
"""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill.command_line import UserError
from featdistill.evaluation.bootstrap import Resampling, interval, model_draws
from featdistill.evaluation.metrics import parts_of, roc_auc
from featdistill.records.labels import label_rows, read_labels, source_of
from featdistill.records.predictions import read_predictions


def compare(predictions: list[str], labels: str | None, resampling: Resampling) -> dict:
    """Rank runs by robust AUC, then by clean AUC, over the images that all of them scored.

    Args:
        predictions: two files or more.
        labels: the label file, or None: the manifest that the first sidecar names.

    Returns:
        `images`, how many are compared; `left_out`, labelled ones that some run did not score; `runs`, the
        best first: `name`, `clean_auc`, `robust_auc`, `auc`, `intervals`; `differences` of each pair and AUC:
        `first`, `second`, `metric`, `difference` (first - second), `low`, `high`, `beyond_chance` (None where
        it cannot be said); `n`: each AUC -> how many images it is taken over.

    Raises:
        UserError: fewer than two files, a name that the labels do not have, or no image that all scored.
    """
    if len(predictions) < 2:
        raise UserError("--compare takes two predictions files or more")
    if len({Path(path).resolve() for path in predictions}) < len(predictions):
        raise UserError("--compare: a predictions file is named twice")
    truth = read_labels(source_of(predictions[0], labels))
    names = run_names(predictions)
    columns = {}
    for name, path in zip(names, predictions, strict=True):
        frame = read_predictions(path)
        score = np.full(len(truth), np.nan)
        score[label_rows(frame, truth)] = frame["score"]
        columns[name] = score
    scores = np.stack(list(columns.values()))
    known = (truth["label"] >= 0).to_numpy()
    rows = known & np.isfinite(scores).all(axis=0)
    if not rows.any():
        raise UserError("--compare: no image has a label and a score of every run")
    # By name, so that the order of the label file's rows changes nothing.
    order = np.flatnonzero(rows)[np.argsort(truth["name"].to_numpy(dtype=str)[rows], kind="stable")]
    result = _compare(truth.iloc[order], names, scores[:, order], resampling)
    return {"images": len(order), "left_out": int(known.sum()) - len(order), **result}


def run_names(paths: list[str]) -> list[str]:
    """Return the shortest ends of the paths, without extension, that tell the runs apart."""
    parts = [Path(path).absolute().with_suffix("").parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _compare(truth: pd.DataFrame, names: list[str], scores: np.ndarray, resampling: Resampling) -> dict:
    label = truth["label"].to_numpy()
    parts = parts_of(truth["is_distorted"].to_numpy(), len(label))
    parts = {metric: parts[metric] for metric in ("robust_auc", "clean_auc", "auc")}
    runs = [
        {"name": name} | {metric: roc_auc(label[rows], score[rows]) for metric, rows in parts.items()}
        for name, score in zip(names, scores, strict=True)
    ]
    # Ranked before anything is drawn, so that the order of the files changes nothing.
    ranked = sorted(
        range(len(runs)), key=lambda run: [*(-(runs[run][metric] or 0.0) for metric in parts), names[run]]
    )
    runs, scores = [runs[run] | {"intervals": {}} for run in ranked], scores[ranked]
    differences = []
    for metric, rows in parts.items():
        drawn = model_draws(label[rows], scores[:, rows], resampling)
        for run, values in zip(runs, drawn, strict=True):
            run["intervals"][metric] = list(interval(values))
        for first, second in combinations(range(len(runs)), 2):
            low, high = interval(drawn[first] - drawn[second])
            aucs = runs[first][metric], runs[second][metric]
            pair = {"first": runs[first]["name"], "second": runs[second]["name"], "metric": metric}
            pair |= {"difference": None if None in aucs else aucs[0] - aucs[1], "low": low, "high": high}
            pair["beyond_chance"] = None if low is None else bool(low > 0 or high < 0)
            differences.append(pair)
    counts = {metric: int(rows.sum()) for metric, rows in parts.items()}
    return {"runs": runs, "differences": differences, "n": counts}
