"""What a robustness sweep shows: Markdown tables of operations and levels, a CSV, the worst cells."""

from collections.abc import Iterator
from typing import Any

from featdistill.text_tables import table

CSV_HEADER = (
    "library",
    "operation",
    "level",
    "scale",
    "auc",
    "low",
    "high",
    "drop",
    "drop_low",
    "drop_high",
    "n",
)
_WORST = 10
_SHOWN_UNREADABLE = 10


def summary(result: dict[str, Any]) -> str:
    """Return what a sweep comes to and its worst cells, aligned for a terminal.

    Args:
        result: what `sweep.sweep` returns; so below.
    """
    unreadable = result["unreadable"]
    lines = [f"could not be read: {one['name']}: {one['reason']}" for one in unreadable[:_SHOWN_UNREADABLE]]
    return "\n\n".join([*_headline(result), _worst(result), *(["\n".join(lines)] if lines else [])]) + "\n"


def markdown(result: dict[str, Any]) -> str:
    """Return all tables."""
    parts = ["# Robustness sweep", *_headline(result), "## Worst cells", _worst(result)]
    for library, found in result["libraries"].items():
        mean = _with_interval(found["mean_robust_auc"], found["mean_robust_auc_interval"])
        parts += [f"## Library {library}", f"Mean robust AUC {mean}.", _library(result, library)]
    if result["left_out"]:
        lines = [
            f"- {one['library']}/{one['operation']} needs {one['missing']}" for one in result["left_out"]
        ]
        parts += ["## Operations left out", "\n".join(lines)]
    if result["unreadable"]:
        lines = [f"- {one['name']}: {one['reason']}" for one in result["unreadable"]]
        parts += ["## Images that could not be read", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def csv_rows(result: dict[str, Any]) -> Iterator[tuple]:
    """Yield the rows of `CSV_HEADER`; the first is of the images as they are."""
    clean = result["clean_auc"], *result["clean_auc_interval"]
    yield "", "none", 0, None, *clean, 0.0, None, None, result["images"]
    for cell in result["cells"]:
        yield tuple(cell[name] for name in CSV_HEADER)


def _headline(result: dict[str, Any]) -> list[str]:
    rows = [
        ["clean", _with_interval(result["clean_auc"], result["clean_auc_interval"])],
        ["mean robust", _with_interval(result["mean_robust_auc"], result["mean_robust_auc_interval"])],
        ["drop", _with_interval(result["mean_drop"], result["mean_drop_interval"])],
    ]
    left_out = [
        f"{len(result['unreadable']):,} could not be read" if result["unreadable"] else "",
        f"{result['distorted']:,} of the manifest are distorted already" if result["distorted"] else "",
        f"{result['unlabelled']:,} have no label" if result["unlabelled"] else "",
    ]
    reasons = "; ".join(reason for reason in left_out if reason)
    at = result["made_by"]["sweep"]["distort_at"]
    where = "as they are stored" if at == "native" else "resized to the input"
    text = (
        f"{result['images']:,} images ({result['real']:,} real, {result['ai']:,} AI-generated) in "
        f"{len(result['cells'])} cells, distorted {where}."
    )
    return [text + (f" Left out: {reasons}." if reasons else ""), table(["", "AUC [95 %]"], rows)]


def _worst(result: dict[str, Any]) -> str:
    cells = sorted(result["cells"], key=lambda cell: cell["auc"])[:_WORST]
    rows = [
        [
            f"{cell['library']}/{cell['operation']}",
            str(cell["level"]),
            f"{cell['scale']:g}",
            _with_interval(cell["auc"], (cell["low"], cell["high"])),
            _with_interval(cell["drop"], (cell["drop_low"], cell["drop_high"])),
        ]
        for cell in cells
    ]
    return table(["worst cells", "level", "scale", "AUC [95 %]", "drop [95 %]"], rows)


def _library(result: dict[str, Any], library: str) -> str:
    cells = {
        (cell["operation"], cell["level"]): cell["auc"]
        for cell in result["cells"]
        if cell["library"] == library
    }
    operations = list(dict.fromkeys(operation for operation, _ in cells))
    levels = sorted({level for _, level in cells})
    aucs = [[cells[operation, level] for level in levels] for operation in operations]
    rows = [
        [operation, *map(_number, row), _number(sum(row) / len(row))]
        for operation, row in zip(operations, aucs, strict=True)
    ]
    means = [sum(column) / len(column) for column in zip(*aucs, strict=True)]
    rows.append(["mean", *map(_number, means), _number(sum(means) / len(means))])
    return table(["operation", *(f"level {level}" for level in levels), "mean"], rows)


def _number(value: float) -> str:
    return f"{value:.4f}"


def _with_interval(value: float, bounds: list | tuple) -> str:
    return _number(value) if bounds[0] is None else f"{value:.4f} [{bounds[0]:.4f}, {bounds[1]:.4f}]"
