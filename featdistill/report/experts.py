"""The experts of an ensemble in the report: how good each one is, and whether they make the same errors."""

import numpy as np

from featdistill.evaluation.experts import corrected_errors, rank_correlations
from featdistill.evaluation.metrics import THRESHOLD
from featdistill.evaluation.splits import Split
from featdistill.report.charts import axis_start, heat_map
from featdistill.report.markup import content_cells, integer, number, share, with_interval


def compare_experts(element_id: str, split: Split, metrics: dict) -> dict:
    """Return the table of AUCs and the comparisons of `split.html`; empty if there is only one expert.

    Args:
        element_id: prefix of the IDs of the charts.
        metrics: what `evaluation.splits.score_split` returns.
    """
    names = split.frame.attrs["experts"]
    if len(names) < 2:
        return {}
    aucs = metrics["experts"]
    everyone = aucs["experts"] | {"mean of experts": aucs["mean"], "ensemble": aucs["ensemble"]}
    rows, keys, control = [], ("robust_auc", "clean_auc"), aucs["ensemble"].get("content")
    for name, row in everyone.items():
        intervals, content = row.get("intervals", {}), row.get("content")
        cells = [with_interval(row[key], *intervals.get(key, ())) for key in keys]
        cells += [content_cells(content and content[key])[1] for key in keys if control]
        rows.append([name, *cells])
    header = ["expert", "robust AUC", "clean AUC", *(["robust exceeds", "clean exceeds"] if control else ())]
    if control:
        rows.append(["content control", *(content_cells(control[key])[0] for key in keys), "", ""])
    scores = [split.frame[f"expert {name}"].to_numpy() for name in names]
    comparisons = [_correlations(element_id, names, scores)]
    if metrics["brier"] is not None and all(((score >= 0) & (score <= 1)).all() for score in scores):
        comparisons.append(_errors(element_id, split, names, scores))
    return {"header": header, "rows": rows, "comparisons": comparisons}


def _correlations(element_id: str, names: list[str], scores: list[np.ndarray]) -> dict:
    values, caption = rank_correlations(scores), "Rank correlation of the experts' scores"
    scale = axis_start(value for row in values for value in row), 1.0
    labels, columns = _numbered(names)
    rows = [[name, *map(number, row)] for name, row in zip(names, values, strict=True)]
    return {
        "title": "Do the experts rank images alike?",
        "note": "Spearman's correlation of two experts' scores over all images; 1 means the same order.",
        "svg": heat_map(f"{element_id}-correlation", caption, labels, columns, values, scale),
        "table": (caption, ["expert", *names], rows),
    }


def _errors(element_id: str, split: Split, names: list[str], scores: list[np.ndarray]) -> dict:
    label, score = split.frame["label"].to_numpy(), split.frame["score"].to_numpy()
    counts, values = corrected_errors(label, [*scores, score])
    caption = "Share of each expert's errors that the others get right"
    labels, columns = _numbered(names)
    labels, columns, everyone = [*labels, "all: ensemble"], [*columns, "all"], [*names, "ensemble"]
    rows = [
        [name, integer(count), *map(share, row)]
        for name, count, row in zip(everyone, counts, values, strict=True)
    ]
    return {
        "title": "Which experts correct each other's errors?",
        "note": f"Share of the errors of a row's expert, at {THRESHOLD}, that a column's expert gets right.",
        "svg": heat_map(f"{element_id}-errors", caption, labels, columns, values, (0.0, 1.0), is_share=True),
        "table": (caption, ["expert", "errors", *everyone], rows),
    }


def _numbered(names: list[str]) -> tuple[list[str], list[str]]:
    """Return the labels of a heat map's rows, number and name, and of its columns, the number alone."""
    numbers = [str(position) for position in range(1, len(names) + 1)]
    return [f"{number_}: {name}" for number_, name in zip(numbers, names, strict=True)], numbers
