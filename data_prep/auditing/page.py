"""The audit for a reader: tables in Markdown, and a page of plots."""

from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.auditing.shortcut import WARN_ABOVE
from featdistill import atomic, text_tables
from featdistill.report.markup import render

# Blue and orange are different for nearly all color-blind readers.
_COLORS = {"real": "#1f6fb4", "AI": "#e07b00"}
_SHOWN_ROWS = 50
_TITLES = {
    "shortcut": "WARNING: the files tell real from AI-generated images without their pixels.",
    "possible": "The files may tell real from AI-generated images; more images are needed to be sure.",
    "none": "The files alone do not tell real from AI-generated images.",
    "undefined": "Whether the files tell real from AI-generated images could not be measured.",
}

_CONTENT_TITLES = {
    "tells": "WARNING: what the images show tells real from AI-generated ones.",
    "may": "What the images show may tell real from AI-generated ones; more images are needed to be sure.",
    "does not": "What the images show does not tell real from AI-generated ones.",
    "undefined": "Whether what the images show tells the classes apart could not be measured.",
}


def verdict_line(result: dict) -> str:
    """Return the result of the pixel-free baseline in one line."""
    baseline = result["baseline"]
    if baseline["auc"] is None:
        return f"{_TITLES['undefined']} {baseline['undefined']}"
    interval = f"AUC {baseline['auc']:.3f} (95 %: {baseline['low']:.3f} to {baseline['high']:.3f})"
    line = f"{_TITLES[baseline['verdict']]} Pixel-free {interval}"
    if baseline["verdict"] in ("shortcut", "possible"):
        alone = {row["feature"]: row["auc_alone"] for row in baseline["features"]}
        line += ", carried by " + ", ".join(f"{name} ({alone[name]:.2f})" for name in baseline["telling"])
    return line


def content_line(content: dict) -> str:
    """Return the result of the content control in one line."""

    def interval(part: dict) -> str:
        if part["auc"] is None:
            return "not defined"
        bounds = f" (95 %: {part['low']:.3f} to {part['high']:.3f})"
        return f"AUC {part['auc']:.3f}{bounds if part['low'] is not None else ''}"

    title = _CONTENT_TITLES["undefined"]
    if content["low"] is not None:
        told = (
            "tells" if content["low"] > WARN_ABOVE else "may" if content["high"] > WARN_ABOVE else "does not"
        )
        title = _CONTENT_TITLES[told]
    parts = {"by folds": content["train"], "held out": content["held_out"]}
    several = all(part["images"] for part in parts.values())
    shown = "".join(f", {name} {interval(part)}" for name, part in parts.items() if several)
    where = f"{content['side']} px ({content['backbone']}, {content['feature']})"
    return f"{title} Content at {where}: {interval(content)}{shown}"


def markdown(result: dict) -> str:
    """Return the audit as Markdown."""
    names: dict[str, list[str]] = {}
    for image in result["suspicious"]:
        for reason in image["reasons"]:
            names.setdefault(reason, []).append(image["name"])
    by_reason = [
        {"what": reason, "images": len(images), "first": ", ".join(images[:3])}
        for reason, images in sorted(names.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    content = result.get("content")
    parts = {"by folds": "train", "held out": "held_out"} if content else {}
    content_rows = [{"part": name, **content[key]} for name, key in parts.items()]
    values = {"content_verdict": content_line(content) if content else "", "content_rows": content_rows}
    values |= {"verdict": verdict_line(result), "by_reason": by_reason, "table": table, "shown": _SHOWN_ROWS}
    return render("audit.md", Path(__file__).parent, **result, **values)


def table(rows: list[dict], columns: list[str]) -> str:
    """Return some columns of rows as a Markdown table."""
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    return text_tables.table(columns, cells) if rows else "None."


def save_plots(result: dict, table: pd.DataFrame, path: Path) -> None:
    """Draw the page of plots as a PNG; `table` has features and `label` of the labeled images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources = [row for row in result["baseline"]["sources"] if row["auc"] is not None]
    sources = sorted(sources, key=lambda row: row["auc"])[-30:]
    figure = Figure(figsize=(15, 17), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(verdict_line(result).replace(" Pixel-free", "\nPixel-free"), fontsize=13)
    axes = figure.subplots(4, 2).ravel()
    sides = {"real": table[table["label"] == 0], "AI": table[table["label"] == 1]}
    panels = {"width": "width in px", "height": "height in px", "aspect": "width / height"}
    panels |= {"bytes_per_pixel": "bytes per pixel", "jpeg_quality": "JPEG quality (estimated; JPEGs only)"}
    for axis, (name, title) in zip(axes[: len(panels)], panels.items(), strict=True):
        values = {side: rows[name].dropna() for side, rows in sides.items()}
        _histogram(axis, values, title, is_log=name != "jpeg_quality")
    _containers(axes[5], sides)
    alone = {row["feature"]: row["auc_alone"] - 0.5 for row in reversed(result["baseline"]["features"])}
    axes[6].barh(list(alone), list(alone.values()), left=0.5)
    axes[6].set_xlim(0.4, 1)
    axes[6].set_title("AUC by one feature alone (dotted: warning threshold)")
    _intervals(axes[7], sources, result["baseline"]["auc"])
    for axis in axes[6:]:
        axis.axvline(WARN_ABOVE, color="black", linestyle=":")
    with atomic.replace_file(path) as temporary:
        # Without matplotlib's version, so that the same plots have the same bytes.
        figure.savefig(temporary, format="png", dpi=80, metadata={"Software": None})


def _histogram(axis, sides: dict[str, pd.Series], title: str, is_log: bool) -> None:
    together = pd.concat(sides.values())
    axis.set_title(title)
    axis.set_ylabel("share of the class's images")
    low, high = float(together.min()), float(together.max())
    if together.nunique() < 2:
        text = "not available for any image" if together.empty else f"{low:g} for all {len(together)} images"
        axis.text(0.5, 0.5, text, ha="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    if is_log:
        low, high = low / 1.02, high * 1.02
        edges = np.geomspace(low, high, 41)
        axis.set_xscale("log")
        ticks = np.geomspace(low, high, 6)
        axis.set_xticks(ticks, [f"{tick:.3g}" if tick < 100 else f"{tick:.0f}" for tick in ticks])
        axis.minorticks_off()
    else:
        edges = np.linspace(low - 0.5, high + 0.5, 41 if high - low > 40 else int(high - low) + 2)
    for side, values in sides.items():
        shares = np.histogram(values, edges)[0] / max(len(values), 1)
        axis.stairs(shares, edges, fill=True, alpha=0.35, color=_COLORS[side])
        axis.stairs(shares, edges, color=_COLORS[side], linewidth=1.5, label=f"{side} ({len(values)})")
    axis.legend()


def _containers(axis, sides: dict[str, pd.DataFrame]) -> None:
    shares = {
        side: (rows["container"] + " " + rows["mode"] + " " + rows["chroma"]).str.strip().value_counts()
        for side, rows in sides.items()
    }
    kinds = pd.concat(shares.values()).groupby(level=0).sum().sort_values().index[-12:]
    position = np.arange(len(kinds))
    for offset, (side, counts) in zip((0.2, -0.2), shares.items(), strict=True):
        part = counts.reindex(kinds, fill_value=0) / max(counts.sum(), 1)
        axis.barh(position + offset, part, height=0.4, color=_COLORS[side], label=side)
    axis.set_yticks(position, kinds)
    axis.set_xlabel("share of the class's images")
    axis.set_title("container, mode, chroma")
    axis.legend(loc="lower right")


def _intervals(axis, sources: list[dict], overall: float | None) -> None:
    names = [f"{row['source'][:32]} ({row['real'] + row['ai']})" for row in sources]
    auc, low, high = (np.array([row[key] for row in sources]) for key in ("auc", "low", "high"))
    if sources:
        spread = np.maximum([auc - low, high - auc], 0)
        axis.errorbar(auc, np.arange(len(names)), xerr=spread, fmt="o", capsize=3)
    # A name may hold dollar signs, which would be read as a formula.
    axis.set_yticks(np.arange(len(names)), names, parse_math=False)
    if overall is not None:
        axis.axvline(overall, color="gray", label=f"all images: {overall:.3f}")
        axis.legend(loc="lower left")
    axis.set_xlim(0, 1.02)
    axis.set_title("pixel-free AUC by source, 95 % interval")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else str(value)
