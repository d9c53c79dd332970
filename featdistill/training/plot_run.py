"""Plot the progress of runs: losses, learning rate, hold-out AUCs and speed of one or more runs.

    python -m featdistill plot runs/stage1/clip_l14_a --out curves.png
    python -m featdistill plot runs/stage2/* --out curves.png              several runs in the same panels

A run in progress is plotted as far as it has come.
"""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from featdistill import atomic
from featdistill.command_line import Parser, UserError

_log = logging.getLogger(__name__)
# Keys of `metrics.jsonl` and the titles of their panels, in this order; losses come first.
PANELS = {
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm before clipping",
    "holdout_clean_auc": "hold-out AUC, clean",
    "holdout_robust_auc": "hold-out AUC, distorted",
    "images_per_s": "images per second",
    "data_wait": "share of time waiting for data",
    "memory_gib": "peak memory in GiB",
}
_NOT_PLOTTED = ("step", "epoch", "skipped", "holdout_images")
_COLUMNS, _PANEL_WIDTH_IN, _PANEL_HEIGHT_IN, _DPI = 3, 4.2, 2.8, 110
# The colors of Okabe and Ito, which color-blind people can distinguish.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_LINE_STYLES = ("-", "--", ":")

Curves = dict[str, tuple[list[int], list[float]]]


def read_curves(run: str | Path) -> Curves:
    """Return key -> (steps, values) from a run's `metrics.jsonl`, without an incomplete last line.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} is not the folder of a run: it has no metrics.jsonl")
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
            if key not in _NOT_PLOTTED and isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(key, ([], []))
                steps.append(line["step"])
                values.append(value)
    return curves


def draw(runs: dict[str, Curves], out: str | Path) -> None:
    """Write a PNG with one panel per key and one line per run; the same curves give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    all_keys = {key for curves in runs.values() for key in curves}
    losses = sorted(all_keys - PANELS.keys(), key=lambda key: (key != "loss", key))
    keys = [*losses, *(key for key in PANELS if key in all_keys)]
    styles = [
        {
            "color": COLORS[run % len(COLORS)],
            "linestyle": _LINE_STYLES[run // len(COLORS) % len(_LINE_STYLES)],
        }
        for run in range(len(runs))
    ]
    rows = -(-len(keys) // _COLUMNS)
    # The legend is below the panels, with three runs per line.
    legend_in = 0.6 + 0.22 * -(-len(runs) // _COLUMNS)
    width_in, height_in = _COLUMNS * _PANEL_WIDTH_IN, rows * _PANEL_HEIGHT_IN + legend_in
    figure = Figure((width_in, height_in), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(
        left=0.7 / width_in,
        right=1 - 0.15 / width_in,
        top=1 - 0.3 / height_in,
        bottom=legend_in / height_in,
        wspace=0.2,
        hspace=0.28,
    )
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    last_step = max(max(steps) for curves in runs.values() for steps, _ in curves.values())
    for panel in panels[len(keys) :]:
        panel.set_axis_off()
    for panel, key in zip(panels, keys, strict=False):
        points = max(len(curves[key][0]) for curves in runs.values() if key in curves)
        marker = "o" if points <= 30 else None
        for style, curves in zip(styles, runs.values(), strict=True):
            if key in curves:
                panel.plot(*curves[key], **style, linewidth=1.4, marker=marker, markersize=3)
        panel.set_title(PANELS.get(key, key.replace("_", " ")), fontsize=10, loc="left")
        panel.set_xlim(0, last_step * 1.02)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        if key == "data_wait":
            panel.set_ylim(0, 1)
        elif key in ("images_per_s", "memory_gib", "learning_rate"):
            panel.set_ylim(0, panel.get_ylim()[1])
        if key == "learning_rate":
            panel.yaxis.set_major_formatter("{x:.1e}")
    for panel in panels[max(0, len(keys) - _COLUMNS) : len(keys)]:
        panel.set_xlabel("optimizer step", fontsize=8)
    lines = [figure.add_artist(Line2D([], [], **style, linewidth=2)) for style in styles]
    figure.legend(lines, list(runs), loc="lower left", ncols=_COLUMNS, fontsize=9, frameon=False)
    with atomic.replace_file(out) as temporary:
        # Without matplotlib's version in the file, the bytes depend on the curves alone.
        figure.savefig(temporary, format="png", metadata={"Software": None})


def build_parser() -> Parser:
    parser = Parser(description="Plot the curves of one or more training runs as one PNG.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py and distill.py")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="where to write the picture")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    paths = [Path(run).resolve() for run in dict.fromkeys(arguments.runs)]
    # Runs are named by the part of their paths in which they differ.
    common = Path(os.path.commonpath(paths)) if len(paths) > 1 else paths[0].parent
    runs = {str(path.relative_to(common)): read_curves(path) for path in paths}
    for path, curves in zip(paths, runs.values(), strict=True):
        if not curves:
            raise UserError(f"{path}/metrics.jsonl is still empty; wait for the first line, or omit the run")
    draw(runs, arguments.out)
    _log.info("%d run%s -> %s", len(runs), "s" if len(runs) > 1 else "", arguments.out)
    return 0
