"""Draw how runs went: losses, learning rate, hold-out AUCs and speed as curves of one or several runs.

    python -m featdistill plot runs/stage1/clip_l14_a --out curves.png
    python -m featdistill plot runs/stage2/* --out curves.png              several runs beside each other

A run that is still going is drawn as far as it is.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from featdistill import atomic
from featdistill.command_line import Parser, UserError

# Keys of `metrics.jsonl` with a title of their own, in the order of their panels; losses come first.
PANELS = {
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm before clipping",
    "holdout_clean_auc": "hold-out AUC, clean",
    "holdout_robust_auc": "hold-out AUC, distorted",
    "images_per_s": "images a second",
    "data_wait": "share of time waiting for data",
    "memory_gib": "peak memory in GiB",
}
_NO_CURVES = ("step", "epoch", "skipped", "holdout_images")
_COLUMNS, _PANEL_WIDTH_IN, _PANEL_HEIGHT_IN, _DPI = 3, 4.2, 2.8, 110
# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")

Curves = dict[str, tuple[list[int], list[float]]]


def read_curves(run: str | Path) -> Curves:
    """Return key -> (steps, values) of a run's `metrics.jsonl`; a last line that is half written is left out.

    Raises:
        UserError: there is no such file, or a line of it is damaged.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} is no run with metrics: it has no metrics.jsonl")
    curves: Curves = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(lines, 1):
        try:
            line: dict[str, Any] = json.loads(text)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is no JSON") from error
        for key, value in line.items():
            if key not in _NO_CURVES and isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(key, ([], []))
                steps.append(line["step"])
                values.append(value)
    return curves


def draw(runs: dict[str, Curves], out: str | Path) -> None:
    """Write a PNG with a panel a key and a line a run; the same curves give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    there = {key for curves in runs.values() for key in curves}
    losses = sorted(there - PANELS.keys(), key=lambda key: (key != "loss", key))
    keys = [*losses, *(key for key in PANELS if key in there)]
    rows = -(-len(keys) // _COLUMNS)
    # The legend stands below the panels, three runs a line.
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
        for place, curves in enumerate(runs.values()):
            if key in curves:
                steps, values = curves[key]
                panel.plot(
                    steps,
                    values,
                    color=_COLOURS[place % len(_COLOURS)],
                    linestyle=("-", "--", ":")[place // len(_COLOURS) % 3],
                    linewidth=1.4,
                    marker="o" if points <= 30 else None,
                    markersize=3,
                )
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
        panel.set_xlabel("optimiser step", fontsize=8)
    lines = [
        figure.add_artist(_legend_line(_COLOURS[place % len(_COLOURS)], place // len(_COLOURS) % 3))
        for place in range(len(runs))
    ]
    figure.legend(lines, list(runs), loc="lower left", ncols=_COLUMNS, fontsize=9, frameon=False)
    with atomic.replace_file(out) as beside:
        # Without matplotlib's version in the file, the bytes depend on the curves alone.
        figure.savefig(beside, format="png", metadata={"Software": None})


def _legend_line(colour: str, style: int) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=("-", "--", ":")[style], linewidth=2)


def build_parser() -> Parser:
    parser = Parser(description="Draw the curves of one or several training runs as one PNG.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of train.py and distill.py")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="where the picture goes")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    paths = [Path(run).resolve() for run in dict.fromkeys(arguments.runs)]
    # What tells the runs apart is enough of a name.
    above = Path(os.path.commonpath(paths)) if len(paths) > 1 else paths[0].parent
    runs = {str(path.relative_to(above)): read_curves(path) for path in paths}
    empty = [path for path, curves in zip(paths, runs.values(), strict=True) if not curves]
    if empty:
        raise UserError(f"{empty[0]}/metrics.jsonl has no line yet; wait for the first, or leave the run out")
    draw(runs, arguments.out)
    print(f"{len(runs)} run{'s' if len(runs) > 1 else ''} -> {arguments.out}")
    return 0
