"""What the report shows of one split. Parts for which the split has no data are left out."""

import math
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from featdistill.calibration.tables import VERDICT_HEADER, verdict_rows
from featdistill.command_line import counted
from featdistill.evaluation.metrics import ACCURACIES, THRESHOLD, one_class, parts_of, roc_curve, tpr_at_fpr
from featdistill.evaluation.splits import Split
from featdistill.report import charts
from featdistill.report.charts import Rows
from featdistill.report.experts import compare_experts
from featdistill.report.gallery import Explainer, gallery
from featdistill.report.markup import (
    CONTENT_COLUMNS,
    content_cells,
    integer,
    interval,
    number,
    share,
    with_interval,
)

_METRICS = {
    "robust_auc": ("Robust AUC", "over the distorted images; the challenge ranks by it"),
    "clean_auc": ("Clean AUC", "over the undistorted images"),
    "auc": ("AUC", "over all images: how often an AI-generated image scores higher than a real one"),
    "average_precision": (
        "Average precision",
        "area under the precision-recall curve; depends on the AI share",
    ),
    "tpr_at_fpr_1": ("TPR at 1 % FPR", "AI-generated images detected while 1 of 100 real ones is labeled AI"),
    "tpr_at_fpr_5": ("TPR at 5 % FPR", "the same while 5 of 100 real ones are labeled AI"),
    "eer": ("Equal error rate", "where the false positive rate equals the false negative rate"),
    "accuracy": (f"Accuracy at {THRESHOLD}", "images on the right side of the threshold"),
    "real_accuracy": (f"Real accuracy at {THRESHOLD}", "the same for the real images"),
    "ai_accuracy": (f"AI accuracy at {THRESHOLD}", "the same for the AI-generated images"),
    "brier": ("Brier score", "mean squared difference of score and label; 0 is best"),
    "ece": ("Calibration error", "how far scores are from the observed shares of AI images; 0 is best"),
}
# The number of images of a metric, if it is not over all.
_COUNTS = {"clean_auc": "clean", "robust_auc": "distorted", "real_accuracy": "real", "ai_accuracy": "ai"}
# AUC -> color class and title of its ROC curve.
_CURVES = {"robust_auc": ("robust", "distorted"), "clean_auc": ("clean", "clean")}
_CURVES |= {"auc": ("all", "all images")}
# False positive rates for which the table of the ROC curves lists the true positive rates.
_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_BINS = 20


class Chart(NamedTuple):
    """A chart with what explains it.

    Attributes:
        svg: the chart.
        table: its data: caption, header and rows.
        legend: (color class, meaning).
        log_svg: the same with a logarithmic axis, to switch to.
    """

    title: str
    svg: str
    table: tuple[str, list[str], list[list[str]]]
    note: Any = ""
    legend: list[tuple[str, str]] | tuple[()] = ()
    log_svg: str = ""


def split_section(
    element_id: str, split: Split, metrics: dict, pictures: int, explainer: Explainer | None = None
) -> tuple[dict, list[str]]:
    """Return the values of `split.html`, and a line for each picture that could not be shown.

    Args:
        element_id: prefix of the IDs of all elements of the section.
        metrics: what `evaluation.splits.score_split` returns.
        pictures: number of errors of each class to show as pictures; 0 for none.
        explainer: see `gallery`.
    """
    drawn = [
        _roc(element_id, split, metrics),
        _histogram(element_id, split),
        _reliability(element_id, metrics),
        _chain_lengths(element_id, metrics),
        _generators(element_id, metrics),
        _distortions(element_id, metrics),
        *_columns(element_id, metrics),
    ]
    errors, lost = {}, []
    if pictures and metrics["brier"] is not None:
        errors, lost = gallery(split.frame, pictures, explainer)
    intervals = metrics["intervals"]
    shown_aucs = {key: with_interval(metrics[key], *intervals[key]) for key in _CURVES}
    values = {
        "id": element_id,
        "name": split.name,
        "verdict_header": VERDICT_HEADER,
        "metrics": metrics,
        "has_intervals": any(low is not None for low, _ in intervals.values()),
        "summary": [split.name, *shown_aucs.values(), integer(metrics["images"]), share(metrics["ai_share"])],
        "tiles": [
            (_METRICS[key][0], number(metrics[key]), interval(*intervals[key]), _control_lines(metrics, key))
            for key in _CURVES
            if metrics[key] is not None
        ],
        "metric_rows": _metric_rows(metrics),
        "verdicts": verdict_rows(metrics.get("verdicts")),
        "content_rows": [
            [split.name, _METRICS[key][0], auc, *content_cells(metrics["content"][key])]
            for key, auc in shown_aucs.items()
            if "content" in metrics and metrics[key] is not None
        ],
        "charts": [chart for chart in drawn if chart],
        "experts": compare_experts(element_id, split, metrics),
        "errors": errors,
    }
    return values, lost


def _metric_rows(metrics: dict) -> list[list[str]]:
    rows, within = [], metrics.get("within_strata")
    content = metrics.get("content", {})
    for key, (title, meaning) in _METRICS.items():
        reason = metrics["undefined"].get(key)
        images = integer(metrics[_COUNTS.get(key, "images")])
        value = with_interval(metrics[key], *metrics["intervals"].get(key, ()))
        rows.append([title, value, images, content.get(key), f"n/a: {reason}" if reason else meaning])
        if within and key in _CURVES:
            row = within[key]
            value, title = with_interval(row["auc"], row["low"], row["high"]), f"{title} within strata"
            meaning = f"the same over {counted(row['pairs'], 'pair')} of images alike in {within['column']}"
            rows.append([title, value, integer(row["images"]), row.get("content"), meaning])
    if "threshold" in metrics:
        at = metrics["threshold"]
        meaning = f"at the threshold with the best balanced accuracy on {at['chosen_on']}"
        for key, title in zip(ACCURACIES, ("Accuracy", "Real accuracy", "AI accuracy"), strict=True):
            images = integer(metrics[_COUNTS.get(key, "images")])
            rows.append([f"{title} at {at['value']:.4g}", number(at[key]), images, None, meaning])
    return [
        [title, value, *(content_cells(control) if content else ()), images, meaning]
        for title, value, images, control, meaning in rows
    ]


def _control_lines(metrics: dict, key: str) -> list[str]:
    """Return what a tile says of the content control."""
    content = metrics.get("content", {}).get(key)
    if content is None or content["auc"] is None:
        return []
    return [f"content control {number(content['auc'])}", f"exceeds it by {content['exceeds']:+.4f}"]


def _roc(element_id: str, split: Split, metrics: dict) -> Chart | None:
    label, score = split.frame["label"].to_numpy(), split.frame["score"].to_numpy()
    curves, titles, legend = {}, [], []
    drawn: list[np.ndarray] = []
    parts = parts_of(split.frame["is_distorted"].to_numpy(), len(label))
    for key, (color, title) in _CURVES.items():
        rows = parts[key]
        # If all images are distorted, one curve would hide the other.
        if not one_class(label[rows]) and not any((rows == other).all() for other in drawn):
            drawn.append(rows)
            curves[color] = roc_curve(label[rows], score[rows])
            titles.append(title)
            legend.append((color, f"{title}, AUC {number(metrics[key])}"))
    if not curves:
        return None
    # The lowest rate that so many images can resolve, between one in ten and one in ten thousand.
    min_fpr = 10.0 ** min(max(math.floor(-math.log10(metrics["real"])), -4), -1)
    lines = {color: (fpr, tpr) for color, (fpr, tpr, _) in curves.items()}
    rows = [
        [f"{100 * rate:g} %", *(share(tpr_at_fpr(curve, rate)) for curve in curves.values())]
        for rate in _RATES
    ]
    return Chart(
        "ROC curves",
        charts.roc_chart(f"{element_id}-roc", "ROC curves", lines),
        ("True positive rate at false positive rates", ["false positive rate", *titles], rows),
        legend=[*legend, ("chance", "chance")],
        log_svg=charts.roc_chart(f"{element_id}-roc-log", "ROC curves, logarithmic", lines, min_fpr),
    )


def _histogram(element_id: str, split: Split) -> Chart:
    label, score = split.frame["label"].to_numpy(), split.frame["score"].to_numpy()
    low, high = min(0.0, float(score.min())), max(1.0, float(score.max()))
    edges = np.linspace(low, high, _BINS + 1)
    titles = {"real": "real", "ai": "AI-generated"}
    counts = {
        color: np.histogram(score[label == value], edges)[0]
        for value, color in enumerate(titles)
        if (label == value).any()
    }
    rows = [
        [f"{edges[row]:.3g} to {edges[row + 1]:.3g}", *(integer(count[row]) for count in counts.values())]
        for row in range(_BINS)
    ]
    shares = {color: count / count.sum() for color, count in counts.items()}
    return Chart(
        "Scores",
        charts.histogram_chart(
            f"{element_id}-scores", "Scores of real and AI-generated images", edges, shares
        ),
        ("Images by score", ["score", *(titles[color] for color in counts)], rows),
        legend=[
            (color, f"{titles[color]}, {counted(int(count.sum()), 'image')}")
            for color, count in counts.items()
        ],
    )


def _reliability(element_id: str, metrics: dict) -> Chart | None:
    bins = [one for one in metrics["reliability"] if one["n"]]
    if not bins:
        return None
    rows = []
    for one in bins:
        scores = f"{one['low']:.3f} to {one['high']:.3f}"
        rows.append([scores, number(one["mean_score"]), share(one["ai_share"]), integer(one["n"])])
    return Chart(
        "Reliability",
        charts.reliability_chart(f"{element_id}-reliability", "Reliability diagram", bins),
        ("Bins of the reliability diagram", ["score", "mean score", "AI share", "images"], rows),
        f"Calibration error {number(metrics['ece'])}, Brier score {number(metrics['brier'])}.",
        [("robust", "score ranges; a larger dot holds more images"), ("chance", "perfect calibration")],
    )


def _chain_lengths(element_id: str, metrics: dict) -> Chart | None:
    rows, title = _defined(metrics["chain_lengths"]), "AUC by number of distortions"
    if len(rows) < 2:
        return None
    svg = charts.curve_chart(f"{element_id}-chains", title, rows, "number of distortions")
    return Chart("Chain length", svg, _auc_table(title, "distortions", rows), legend=_control_key(rows))


def _generators(element_id: str, metrics: dict) -> Chart | None:
    rows, title = sorted(_defined(metrics["generators"]), key=_hardest_first), "AUC by generator"
    if not rows:
        return None
    svg = charts.bar_chart(f"{element_id}-generators", title, rows)
    note = "Each generator against all real images, hardest first. Bars start at 0.5, which is chance."
    return Chart("Generators", svg, _auc_table(title, "generator", rows), note, _control_key(rows))


def _columns(element_id: str, metrics: dict) -> list[Chart]:
    """Return a chart for each column that the AUCs are broken down by."""
    found = []
    for position, (column, groups) in enumerate(metrics["by"].items(), start=1):
        rows, title = _defined(groups), f"AUC by {column}"
        if rows:
            svg = charts.bar_chart(f"{element_id}-by-{position}", title, rows)
            note = "A value with images of one class only is set against all images of the other."
            table = _auc_table(title, column, rows)
            found.append(
                Chart(Markup("By <bdi>{}</bdi>").format(column), svg, table, note, _control_key(rows))
            )
    return found


def _distortions(element_id: str, metrics: dict) -> Chart | None:
    rows, title = sorted(_defined(metrics["distortions"]), key=_hardest_first), "AUC by distortion and level"
    if not rows:
        return None
    by_level = metrics["distortion_levels"]
    columns = sorted({level for levels in by_level.values() for level in levels}, key=int)
    values, cells = [], []
    for name, row in rows:
        levels = by_level.get(name, {})
        values.append([row["auc"], *(levels.get(level, {}).get("auc") for level in columns)])
        cells += [(f"{name}, all", row), *((f"{name}, level {level}", levels[level]) for level in levels)]
    note = "Images with the distortion in their chain, hardest first. Empty cells have no AUC."
    if columns:
        note += " Columns: all levels, then each level; distortions without known levels have only the first."
    names, scale = [name for name, _ in rows], (charts.axis_start(row["auc"] for _, row in cells), 1.0)
    svg = charts.heat_map(f"{element_id}-distortions", title, names, ["all", *columns], values, scale)
    return Chart("Distortions", svg, _auc_table(title, "distortion", cells), note)


def _defined(groups: dict[str, dict]) -> Rows:
    return [(name, row) for name, row in groups.items() if row["auc"] is not None]


def _hardest_first(row: tuple[str, dict]) -> tuple[float, str]:
    return row[1]["auc"], row[0]


def _auc_table(caption: str, what: str, rows: Rows) -> tuple[str, list[str], list[list[str]]]:
    cells, has_content = [], any("content" in row for _, row in rows)
    for name, row in rows:
        counts = integer(row["real"]), integer(row["ai"])
        content = content_cells(row.get("content")) if has_content else []
        cells.append([name, number(row["auc"]), interval(row["low"], row["high"]), *content, *counts])
    header = [what, "AUC", "95 % interval", *(CONTENT_COLUMNS if has_content else ()), "real", "AI"]
    return caption, header, cells


def _control_key(rows: Rows) -> list[tuple[str, str]]:
    """Return the legend of a chart that shows the content control of each group."""
    return [("control", "content control")] if any("content" in row for _, row in rows) else []
