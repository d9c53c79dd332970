"""The charts of the report as SVG: ROC curves, histograms, reliability, AUCs by group, and heat maps.

Colors are classes of `report.css`, so that a chart follows the page from light to dark. Every chart has a
title and a description for screen readers, and on the page a table with the same data.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from featdistill.report.axes import WIDTH, Axes, Axis, round_axis
from featdistill.report.markup import number, render, share, shorten

# Shades of a heat map, `h0` to `h8` in `report.css`.
SHADES = 9
_DIAGONAL = np.array([0.0, 1.0])

# False and true positive rates, both rising from 0 to 1.
Curve = tuple[np.ndarray, np.ndarray]
# Groups of images: (name, row of a breakdown with `auc`, `low` and `high`).
Rows = Sequence[tuple[str, dict]]


def roc_chart(element_id: str, title: str, curves: dict[str, Curve], min_fpr: float | None = None) -> str:
    """Draw ROC curves.

    Args:
        curves: color class -> curve.
        min_fpr: start of a logarithmic horizontal axis; None for a linear one.
    """
    x, scale = round_axis("real images labeled AI", is_share=True), ""
    if min_fpr is not None:
        powers = [10.0**power for power in range(round(math.log10(min_fpr)), 1)]
        x = x._replace(low=min_fpr, ticks=[(power, f"{100 * power:g} %") for power in powers])
        scale = ", on a logarithmic axis"
    y = round_axis("AI-generated images detected", is_share=True)
    axes = Axes(x, y, is_log=min_fpr is not None)
    lines = [("chance", axes.line(_DIAGONAL, _DIAGONAL))]
    lines += [(f"line {color}", axes.line(*curve)) for color, curve in curves.items()]
    return render(
        "plot.html",
        id=element_id,
        title=title,
        description=f"True positive rate over false positive rate{scale}: {', '.join(curves)}, chance.",
        axes=axes,
        lines=lines,
    )


def histogram_chart(element_id: str, title: str, edges: np.ndarray, shares: dict[str, np.ndarray]) -> str:
    """Draw overlaid histograms as areas with outlines.

    Args:
        edges: (B + 1,) of the bins.
        shares: color class -> (B,) share of the class's images.
    """
    highest = max(float(values.max()) for values in shares.values())
    x = round_axis("score", float(edges[0]), float(edges[-1]))
    axes = Axes(x, round_axis("share of the class's images", high=1.05 * highest, is_share=True))
    outlines = {color: np.concatenate([[0.0], np.repeat(y, 2), [0.0]]) for color, y in shares.items()}
    return render(
        "plot.html",
        id=element_id,
        title=title,
        description=f"Share of each class's images in {len(edges) - 1} score ranges: {', '.join(shares)}.",
        axes=axes,
        lines=[(f"area line {color}", axes.line(np.repeat(edges, 2), y)) for color, y in outlines.items()],
    )


def reliability_chart(element_id: str, title: str, bins: Sequence[dict]) -> str:
    """Draw the bins of `metrics.reliability` that hold images; the larger the dot, the more images."""
    axes = Axes(round_axis("mean score"), round_axis("share that is AI-generated"))
    largest = max(one["n"] for one in bins)
    x, y = (np.array([one[key] for one in bins]) for key in ("mean_score", "ai_share"))
    sizes = [2.5 + 4.5 * math.sqrt(one["n"] / largest) for one in bins]
    return render(
        "plot.html",
        id=element_id,
        title=title,
        description=f"Share of AI-generated images against the mean score, in {len(bins)} score ranges; "
        "perfectly calibrated scores are on the diagonal.",
        axes=axes,
        lines=[("chance", axes.line(_DIAGONAL, _DIAGONAL)), ("line robust", axes.line(x, y))],
        dots=list(zip(x, y, sizes, strict=True)),
    )


def curve_chart(element_id: str, title: str, rows: Rows, x_title: str) -> str:
    """Draw the AUCs of groups as a curve with intervals."""
    ticks = [(count, shorten(name, 8)) for count, (name, _) in enumerate(rows)]
    axes = Axes(Axis(x_title, -0.5, len(rows) - 0.5, ticks), round_axis("AUC", _lowest(rows)))
    aucs = np.array([row["auc"] for _, row in rows])
    return render(
        "plot.html",
        id=element_id,
        title=title,
        description=_list_aucs(rows),
        axes=axes,
        lines=[("line robust", axes.line(np.arange(len(rows)), aucs))],
        groups=[row for _, row in rows],
    )


def bar_chart(element_id: str, title: str, rows: Rows) -> str:
    """Draw the AUCs of groups as bars that start at 0.5, which is chance, with their intervals."""
    axes = Axes(round_axis("AUC", min(0.5, _lowest(rows))), round_axis(""), left=8, width=WIDTH - 20)
    return render("bars.html", id=element_id, title=title, description=_list_aucs(rows), axes=axes, rows=rows)


def heat_map(
    element_id: str,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    scale: tuple[float, float],
    *,
    is_share: bool = False,
) -> str:
    """Draw a table of numbers on shades from dark (low) to light (high).

    Args:
        values: for each of `rows` a value per column; a cell of None is empty.
        scale: the values of the darkest and the lightest shade; values beyond them get the same shades.
        is_share: print values as percentages.
    """
    low, high = scale

    def cell(value: float) -> tuple[str, int]:
        shade = math.floor(SHADES * (value - low) / (high - low))
        return share(value, 0) if is_share else number(value, 3), min(max(shade, 0), SHADES - 1)

    cells = [[None if value is None else cell(value) for value in row] for row in values]
    low_text, high_text = (share(end, 0) if is_share else f"{end:g}" for end in scale)
    return render(
        "heat_map.html",
        id=element_id,
        title=title,
        description=f"{len(rows)} rows, {len(columns)} columns, shades from dark, {low_text}, "
        f"to light, {high_text}.",
        rows=list(zip(rows, cells, strict=True)),
        columns=columns,
        shades=SHADES,
        ends=(low_text, high_text),
        label_length=min(22, max(map(len, rows))),
        max_width=1.3 * WIDTH,
    )


def axis_start(values: Iterable[float | None]) -> float:
    """Return where an axis starts: the lowest defined value, rounded down to a tenth, and at most 0.9."""
    lowest = min((value for value in values if value is not None), default=0.9)
    return min(math.floor(lowest * 10 + 1e-9) / 10, 0.9)


def _lowest(rows: Rows) -> float:
    controls = (row["content"]["auc"] for _, row in rows if "content" in row)
    return axis_start([*(row[key] for _, row in rows for key in ("auc", "low")), *controls])


def _list_aucs(rows: Rows) -> str:
    aucs = [f"{name} {number(row['auc'], 3)}{_control_text(row)}" for name, row in rows]
    return f"AUCs with their intervals: {', '.join(aucs)}."


def _control_text(row: dict) -> str:
    return f" (content control {number(row['content']['auc'], 3)})" if "content" in row else ""
