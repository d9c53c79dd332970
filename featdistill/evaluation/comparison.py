"""Which of several runs is better, and is the difference beyond chance? Paired, over the images all scored.

Runs that score the same images share most of what chance does to them, so the interval of their difference is
far narrower than their two intervals suggest. A difference is beyond chance if its 95 % interval excludes 0.
Pairs are not corrected for their number: of twenty pairs of equal runs, expect one to seem different.
"""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill.command_line import UserError, counted
from featdistill.evaluation.intervals import METHOD, auc_bounds, difference_bounds
from featdistill.evaluation.metrics import parts_of, roc_auc
from featdistill.evaluation.stratified import aucs, count_pairs
from featdistill.records.labels import label_rows, read_labels, source_of
from featdistill.records.predictions import read_predictions
from featdistill.records.strata import column_strata
from featdistill.text_tables import table, with_interval

# Runs are ranked by the first, ties by the next.
METRICS = ("robust_auc", "clean_auc", "auc")
# Ends the name of a metric over the pairs within strata.
WITHIN = "_within_strata"


def compare(predictions: list[str], labels: str | None = None, strata: str | None = None) -> dict:
    """Rank runs by robust AUC, then by clean AUC, over the images that all of them scored.

    Args:
        predictions: two or more files.
        labels: the label file, or None for the manifest that the first sidecar names.
        strata: a column; adds the metrics over the pairs within its strata, with `WITHIN` after their names.

    Returns:
        `images`, how many are compared; `left_out`, labeled ones that some run did not score; `intervals`:
        how they were computed; `strata`: the column; `runs`, best first: `name`, `METRICS`, `intervals`;
        `differences` of each pair and metric: `first`, `second`, `metric`, `difference` (first - second),
        `low`, `high`, `beyond_chance` (None where it is not defined); `n`: metric -> number of images.

    Raises:
        UserError: fewer than two files, a name that is not in the labels, no image that all scored, or a
            column without strata of both classes.
    """
    if len(predictions) < 2:
        raise UserError("a comparison needs two predictions files or more")
    if len({Path(path).resolve() for path in predictions}) < len(predictions):
        raise UserError("a predictions file is named twice")
    truth = read_labels(source_of(predictions[0], labels), () if strata is None else (strata,))
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
    compared = truth.iloc[order]
    codes = None if strata is None else _strata_of(compared, strata, truth.attrs["path"])
    result = _compare(compared, names, scores[:, order], codes)
    left_out = int(known.sum()) - len(order)
    facts = {"images": len(order), "left_out": left_out, "intervals": METHOD}
    return {**facts, **({} if strata is None else {"strata": strata}), **result}


def run_names(paths: list[str]) -> list[str]:
    """Return the shortest ends of the paths, without extension, that distinguish the runs."""
    parts = [Path(path).absolute().with_suffix("").parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def markdown(result: dict) -> str:
    """Return the ranking and the differences of `compare`."""
    strata = result.get("strata")
    metrics = [*METRICS, *(metric + WITHIN for metric in METRICS if strata is not None)]
    titles = {metric: metric_title(metric, strata) for metric in metrics}
    runs = [
        [str(rank), run["name"], *(with_interval(run[key], run["intervals"][key]) for key in metrics)]
        for rank, run in enumerate(result["runs"], start=1)
    ]
    verdicts = {True: "yes", False: "no", None: "n/a"}
    pairs = [
        [
            pair["first"],
            pair["second"],
            titles[pair["metric"]],
            f"{pair['difference']:+z.4f}",
            "" if pair["low"] is None else f"{pair['low']:+z.4f} to {pair['high']:+z.4f}",
            verdicts[pair["beyond_chance"]],
        ]
        for pair in result["differences"]
        if pair["difference"] is not None
    ]
    left_out = f"; {result['left_out']:,} that some run did not score are left out"
    parts = [
        "# Comparison",
        f"{counted(result['images'], 'image')} that all runs scored{left_out if result['left_out'] else ''}.",
        table(["place", "run", *titles.values()], runs),
        "## Differences",
        "First minus second, with the paired 95 % interval (DeLong). Pairs are not corrected for their "
        "number: of twenty pairs of equal runs, expect one to seem different.",
        table(["first", "second", "metric", "difference", "95 %", "beyond chance"], pairs),
    ]
    return "\n\n".join(parts) + "\n"


def csv_rows(result: dict) -> Iterator[tuple]:
    """Yield the rows of `tables.CSV_HEADER` of a comparison; `split` is the run, or `first - second`."""
    for run in result["runs"]:
        for metric, bounds in run["intervals"].items():
            yield run["name"], metric, run[metric], *bounds, result["n"][metric]
    for pair in result["differences"]:
        name, metric = f"{pair['first']} - {pair['second']}", pair["metric"]
        yield name, metric, pair["difference"], pair["low"], pair["high"], result["n"][metric]


def metric_title(metric: str, strata: str | None) -> str:
    """Return `robust AUC` for `robust_auc`, and `robust AUC within scale` for the one within strata."""
    title = metric.removesuffix(WITHIN).replace("_", " ").replace("auc", "AUC")
    return f"{title} within {strata}" if metric.endswith(WITHIN) else title


def _strata_of(truth: pd.DataFrame, column: str, where: str) -> np.ndarray:
    rows = pd.DataFrame({column: truth[f"column {column}"]})
    codes = column_strata(rows, column, f"{where} (images that all scored)").cat.codes.to_numpy()
    if not count_pairs(truth["label"].to_numpy(), codes)["pairs"]:
        raise UserError(
            f"--strata {column}: no stratum holds real and AI-generated images; choose a column that both "
            "classes share"
        )
    return codes


def _compare(truth: pd.DataFrame, names: list[str], scores: np.ndarray, strata: np.ndarray | None) -> dict:
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
    measured = {metric: (rows, None) for metric, rows in parts.items()}
    if strata is not None:
        measured |= {metric + WITHIN: (rows, strata[rows]) for metric, rows in parts.items()}
    differences, counts = [], {}
    for metric, (rows, stratum) in measured.items():
        counts[metric] = int(rows.sum()) if stratum is None else count_pairs(label[rows], stratum)["images"]
        values, covariance = aucs(label[rows], scores[:, rows], stratum)
        for run, value, variance in zip(runs, values, np.diag(covariance), strict=True):
            run[metric] = value
            run["intervals"][metric] = list(auc_bounds(value, variance))
        for one, other in combinations(range(len(runs)), 2):
            first, second = runs[one], runs[other]
            difference = None if first[metric] is None else first[metric] - second[metric]
            variance = covariance[one, one] + covariance[other, other] - 2 * covariance[one, other]
            low, high = difference_bounds(difference, variance)
            pair = {"first": first["name"], "second": second["name"], "metric": metric}
            pair |= {"difference": difference, "low": low, "high": high}
            pair["beyond_chance"] = None if low is None else low > 0 or high < 0
            differences.append(pair)
    return {"runs": runs, "differences": differences, "n": counts}
