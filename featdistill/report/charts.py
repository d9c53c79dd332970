"""The charts of the report: ROC curves, histograms, reliability, AUCs by group, and heat maps."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from featdistill.report.drawing import (
    WIDTH,
    Axes,
    drawing,
    frame,
    label,
    line,
    path,
    round_ticks,
    short,
    units,
)
from featdistill.report.markup import Content, Html, element, number, scrolling

# Shades of a heat map, `h0` to `h8` in `report.css`.
SHADES = 9
_SHARES = [(tick, f"{100 * tick:.0f} %") for tick in (0, 0.2, 0.4, 0.6, 0.8, 1)]
_UNIT = [(tick, f"{tick:g}") for tick in (0, 0.2, 0.4, 0.6, 0.8, 1)]
_DIAGONAL = np.array([0.0, 1.0])
# Of the text of a heat map: units a character, and characters of a name.
_CHARACTER, _LONGEST = 7.6, 22
_WIDEST = 1.3 * WIDTH

Curve = tuple[np.ndarray, np.ndarray]


def roc_chart(identity: str, title: str, curves: dict[str, Curve], least_rate: float | None = None) -> Html:
    """Draw ROC curves.

    Args:
        curves: class of the colour -> false and true positive rates, both rising from 0 to 1.
        least_rate: where the horizontal axis begins when it is logarithmic; None for a linear one.
    """
    axes = Axes((least_rate or 0.0, 1.0), (0.0, 1.0), least_rate is not None)
    ticks = _SHARES
    if least_rate is not None:
        powers = range(round(math.log10(least_rate)), 1)
        ticks = [(10.0**power, f"{100 * 10.0**power:g} %") for power in powers]
    lines = [line("chance", axes, *_resampled((_DIAGONAL, _DIAGONAL), axes))]
    lines += [line(f"line {name}", axes, *_resampled(curve, axes)) for name, curve in curves.items()]
    how = ", on a logarithmic axis" if axes.is_log else ""
    return drawing(
        identity,
        title,
        f"True positive rate against false positive rate{how}: curves {', '.join(curves)}, and pure chance.",
        axes.size(),
        frame(axes, ticks, _SHARES, "real images called AI", "AI-generated images found"),
        lines,
    )


def histogram_chart(identity: str, title: str, edges: np.ndarray, shares: dict[str, np.ndarray]) -> Html:
    """Draw histograms over one another, as areas with outlines.

    Args:
        edges: (B + 1,) of the bins.
        shares: class of the colour -> (B,) share of the class's images.
    """
    most = max(float(values.max()) for values in shares.values())
    axes = Axes((float(edges[0]), float(edges[-1])), (0.0, 1.05 * most))
    x = np.repeat(edges, 2)
    areas = [
        line(f"area line {name}", axes, x, np.concatenate([[0.0], np.repeat(values, 2), [0.0]]))
        for name, values in shares.items()
    ]
    return drawing(
        identity,
        title,
        f"Share of each class's images in {len(edges) - 1} ranges of the score: {', '.join(shares)}.",
        axes.size(),
        frame(
            axes,
            [(tick, f"{tick:g}") for tick in round_ticks(*axes.x)],
            [(tick, f"{100 * tick:g} %") for tick in round_ticks(*axes.y)],
            "score",
            "share of the class's images",
        ),
        areas,
    )


def reliability_chart(identity: str, title: str, bins: Sequence[dict]) -> Html:
    """Draw the bins of `calibration.reliability` that hold images; a larger dot holds more of them."""
    axes = Axes((0.0, 1.0), (0.0, 1.0))
    rows = [one for one in bins if one["n"]]
    most = max(one["n"] for one in rows)
    x, y = (np.array([one[key] for one in rows]) for key in ("mean_score", "ai_share"))
    dots = [
        _dot(
            axes.across(one["mean_score"]), axes.down(one["ai_share"]), 2.5 + 4.5 * math.sqrt(one["n"] / most)
        )
        for one in rows
    ]
    return drawing(
        identity,
        title,
        f"Share of AI-generated images against the mean score, in {len(rows)} ranges of the score; "
        "on the diagonal a score means what it says.",
        axes.size(),
        frame(axes, _UNIT, _UNIT, "mean score", "share that is AI-generated"),
        line("chance", axes, _DIAGONAL, _DIAGONAL),
        line("line robust", axes, x, y),
        dots,
    )


def curve_chart(identity: str, title: str, rows: Sequence[tuple[str, dict]], x_title: str) -> Html:
    """Draw the AUCs of rows of a breakdown, in their order, with intervals."""
    axes = Axes((-0.5, len(rows) - 0.5), (_lowest(rows), 1.0))
    points: list[Content] = []
    for count, (_, row) in enumerate(rows):
        left, top = axes.across(count), axes.down(row["auc"])
        if row["low"] is not None:
            points.append(_whisker((left, axes.down(row["low"])), (left, axes.down(row["high"]))))
        points.append(_dot(left, top, 4))
        # Below the axis, where no line runs through it.
        points.append(label(number(row["auc"], 3), left, axes.top + axes.height + 34, "middle", "value"))
    return drawing(
        identity,
        title,
        _listed(rows),
        (WIDTH, axes.size()[1] + 16),
        frame(
            axes,
            [(float(count), short(name, 8)) for count, (name, _) in enumerate(rows)],
            [(tick, f"{tick:g}") for tick in round_ticks(*axes.y)],
            x_title,
            "AUC",
            title_below=16,
        ),
        line("line robust", axes, np.arange(len(rows)), np.array([row["auc"] for _, row in rows])),
        points,
    )


def bar_chart(identity: str, title: str, rows: Sequence[tuple[str, dict]]) -> Html:
    """Draw the AUCs of rows of a breakdown as bars from 0.5, what chance gives, with their intervals."""
    pitch, thickness, bottom = 38, 11, 38 * len(rows) + 6
    low = min(0.5, _lowest(rows))
    axes = Axes((low, 1.0), (0.0, 1.0), left=8, width=WIDTH - 20)
    parts: list[Content] = []
    for tick in round_ticks(*axes.x):
        left = axes.across(tick)
        parts.append(path("grid", f"M{units(left)},4V{bottom}"))
        anchor = {low: "start", 1.0: "end"}.get(tick, "middle")
        parts.append(label(f"{tick:g}", left, bottom + 16, anchor))
    for count, (name, row) in enumerate(rows):
        top = pitch * count + 23
        start, end = sorted((float(axes.across(0.5)), float(axes.across(row["auc"]))))
        parts.append(label(short(name, 36), axes.left, top - 6, "start"))
        parts.append(label(number(row["auc"], 3), axes.left + axes.width, top - 6, "end", "value"))
        box = {"x": units(start), "y": top, "width": units(end - start), "height": thickness}
        parts.append(element("rect", **box, class_="bar"))
        if row["low"] is not None:
            ends = (axes.across(row[key]) for key in ("low", "high"))
            parts.append(_whisker(*((end, top + thickness / 2) for end in ends)))
    return drawing(identity, title, _listed(rows), (WIDTH, bottom + 24), parts)


def heat_map(
    identity: str,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    scale: tuple[float, float],
    *,
    is_share: bool = False,
) -> Html:
    """Draw a table of numbers on shades that go from dark (low) to light (high).

    Args:
        values: a row each of `rows`, a value each of `columns`; a cell of None is empty.
        scale: the values of the darkest and of the lightest shade; what lies beyond has theirs.
        is_share: whether values are printed as percentages.
    """
    left = _CHARACTER * min(_LONGEST, max(map(len, rows))) + 12
    pitch, cell, top, swatch = 25, 43, 24, 14
    parts: list[Content] = [
        label(short(name, 6), left + cell * (column + 0.5), top - 7, "middle")
        for column, name in enumerate(columns)
    ]
    for row, (name, own) in enumerate(zip(rows, values, strict=True)):
        above = top + pitch * row
        parts.append(label(short(name, _LONGEST), left - 7, above + 17, "end"))
        for column, value in enumerate(own):
            if value is not None:
                shown = f"{100 * value:.0f} %" if is_share else number(value, 3)
                box = {"x": units(left + cell * column + 1), "y": above + 1}
                parts.append(
                    element(
                        "g",
                        element("rect", **box, width=cell - 2, height=pitch - 2, rx=3),
                        label(shown, left + cell * (column + 0.5), above + 17, "middle"),
                        class_=_shade(value, scale),
                    )
                )
    bottom = top + pitch * len(rows) + 10
    first, last = (f"{100 * end:.0f} %" if is_share else f"{end:g}" for end in scale)
    parts.append(label(first, left - 7, bottom + 12, "end"))
    for shade in range(SHADES):
        box = {"x": units(left + swatch * shade), "y": bottom, "width": swatch, "height": swatch}
        parts.append(element("g", element("rect", **box), class_=f"h{shade}"))
    parts.append(label(last, left + swatch * SHADES + 7, bottom + 12, "start"))
    width = left + max(cell * len(columns), swatch * SHADES + 45) + 2
    description = f"{len(rows)} rows, {len(columns)} columns, shades from dark, {first}, to light, {last}."
    found = drawing(identity, title, description, (width, bottom + swatch + 4), parts)
    # A wide one scrolls: made small enough for a phone, it could not be read.
    return scrolling(title, found) if width > _WIDEST else found


def tenth_below(values: Iterable[float | None]) -> float:
    """Return the tenth below the least of the values that are defined, 0.9 at most: where an axis begins."""
    least = min((value for value in values if value is not None), default=0.9)
    return min(math.floor(least * 10 + 1e-9) / 10, 0.9)


def _resampled(curve: Curve, axes: Axes) -> Curve:
    """Return a curve with points added where a straight line is not straight on a logarithmic axis."""
    if not axes.is_log:
        return curve
    x, y = curve
    grid = np.geomspace(*axes.x, 100)
    x, y = np.concatenate([x, grid]), np.concatenate([y, np.interp(grid, x, y)])
    order = np.lexsort((y, x))
    return x[order], y[order]


def _whisker(first: tuple[float, float], last: tuple[float, float]) -> Html:
    return path("whisker", "M" + "L".join(f"{units(left)},{units(top)}" for left, top in (first, last)))


def _dot(x: float, y: float, radius: float) -> Html:
    return element("circle", cx=units(x), cy=units(y), r=units(radius), class_="dot")


def _shade(value: float, scale: tuple[float, float]) -> str:
    shade = math.floor(SHADES * (value - scale[0]) / (scale[1] - scale[0]))
    return f"h{min(max(shade, 0), SHADES - 1)}"


def _lowest(rows: Sequence[tuple[str, dict]]) -> float:
    return tenth_below(row[key] for _, row in rows for key in ("auc", "low"))


def _listed(rows: Sequence[tuple[str, dict]]) -> str:
    values = (f"{name} {number(row['auc'], 3)}" for name, row in rows)
    return f"AUCs with their intervals: {', '.join(values)}."
