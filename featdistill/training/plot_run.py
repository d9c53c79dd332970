"""Plot the losses, learning rate, hold-out AUCs and speed of one or several runs.

    python -m featdistill plot runs/stage1/clip_l14_a --out curves.png
    python -m featdistill plot runs/stage2/* --out curves.png              several runs in one picture

A run that has not finished is plotted as far as it is.
"""

import json
import math
import os
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.images.listing import printable

# Panels with titles of their own, in this order, by the key in `metrics.jsonl`; losses come first.
PANELS = {
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm before clipping",
    "holdout_clean_auc": "hold-out AUC, clean",
    "holdout_robust_auc": "hold-out AUC, distorted",
    "images_per_s": "images per second",
    "data_wait": "share of time waiting for data",
    "memory_gib": "peak memory in GiB",
}
_FROM_ZERO = ("images_per_s", "memory_gib", "learning_rate", "data_wait")
_NO_CURVES = ("step", "epoch", "skipped", "holdout_images")
_COLUMNS, _PANEL_WIDTH_IN, _PANEL_HEIGHT_IN, _DPI = 3, 4.2, 2.8, 110
# Okabe and Ito's colors, which are distinct for people with color blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")

Curves = dict[str, tuple[list[int], list[float]]]


def read_curves(run: str | Path) -> Curves:
    """Return key -> (steps, values) of a run's `metrics.jsonl`; an incomplete last line is ignored.

    Raises:
        UserError: there is no such file, or a line of it is damaged.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} is not a run with metrics: it has no metrics.jsonl")
    curves: Curves = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(lines, 1):
        try:
            line: dict[str, Any] = json.loads(text)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not JSON") from error
        for key, value in line.items():
            if key not in _NO_CURVES and isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(key, ([], []))
                steps.append(line["step"])
                values.append(value)
    return curves


def read_runs(runs: Sequence[str]) -> dict[str, Curves]:
    """Return the curves of each run, by the part of its path that tells it from the others.

    Raises:
        UserError: see `read_curves`; or a run has no metrics yet.
    """
    paths = [Path(run).resolve() for run in dict.fromkeys(runs)]
    parent = Path(os.path.commonpath(paths)) if len(paths) > 1 else paths[0].parent
    curves = {}
    for path in paths:
        curves[str(path.relative_to(parent))] = read_curves(path)
        if not curves[str(path.relative_to(parent))]:
            raise UserError(f"{path}/metrics.jsonl is empty; wait for its first line, or leave the run out")
    return curves


def draw(runs: dict[str, Curves], out: str | Path) -> None:
    """Write a PNG with a panel per key and a line per run; equal curves give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    present = {key for curves in runs.values() for key in curves}
    losses = sorted(present - PANELS.keys(), key=lambda key: (key != "loss", key))
    keys = [*losses, *(key for key in PANELS if key in present)]
    rows, legend_rows = -(-len(keys) // _COLUMNS), -(-len(runs) // _COLUMNS)
    height_in = rows * _PANEL_HEIGHT_IN + 0.3 + 0.22 * legend_rows
    styles = [(color, style) for style in ("-", "--", ":") for color in COLORS]
    last_step = max(max(steps) for curves in runs.values() for steps, _ in curves.values())
    figure = Figure((_COLUMNS * _PANEL_WIDTH_IN, height_in), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False, sharex=True).ravel()
    for panel in panels[len(keys) :]:
        panel.set_axis_off()
    for panel, key in zip(panels, keys, strict=False):
        points = max(len(curves[key][0]) for curves in runs.values() if key in curves)
        marker = {"marker": "o", "markersize": 3} if points <= 30 else {}
        for (name, curves), (color, style) in zip(runs.items(), cycle(styles), strict=False):
            steps, values = curves.get(key, ([], []))
            panel.plot(
                steps, values, color=color, linestyle=style, linewidth=1.4, label=printable(name), **marker
            )
        panel.set_title(PANELS.get(key, key.replace("_", " ")), fontsize=10, loc="left")
        panel.set_xlim(0, last_step * 1.02)
        panel.set_ylim(bottom=0 if key in _FROM_ZERO else None, top=1 if key == "data_wait" else None)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8, labelbottom=True)
        if key == "learning_rate":
            panel.yaxis.set_major_formatter("{x:.1e}")
    for panel in panels[max(0, len(keys) - _COLUMNS) : len(keys)]:
        panel.set_xlabel("optimizer step", fontsize=8)
    legend = figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=_COLUMNS, frameon=False
    )
    for text in legend.get_texts():
        # A name may hold dollar signs, which would be read as a formula.
        text.set_parse_math(False)
    with atomic.replace_file(out) as temporary:
        # Without matplotlib's version in the file, its bytes depend on the curves alone.
        figure.savefig(temporary, format="png", metadata={"Software": None})
