"""The tables of a robustness sweep: the worst cells, operations by level, and a CSV."""

from collections.abc import Iterator
from typing import Any

from featdistill.command_line import counted
from featdistill.text_tables import number, table, with_interval

# Of a cell: its AUC and how far that is below the AUC of the undistorted images, with their intervals.
FIGURES = ("auc", "low", "high", "drop", "drop_low", "drop_high")
CSV_HEADER = ("library", "operation", "level", "scale", *FIGURES, "n")
_WORST = 10
_SHOWN_UNREADABLE = 10


def summary(result: dict[str, Any]) -> str:
    """Return the means of a sweep and its worst cells, aligned for a terminal.

    Args:
        result: what `sweep.json` holds; so below.
    """
    unreadable = result["unreadable"]
    lines = [f"could not be read: {one['name']}: {one['reason']}" for one in unreadable[:_SHOWN_UNREADABLE]]
    return "\n\n".join([*_headline(result), _worst(result), *(["\n".join(lines)] if lines else [])]) + "\n"


def markdown(result: dict[str, Any]) -> str:
    """Return all tables."""
    parts = ["# Robustness sweep", *_headline(result), "## Worst cells", _worst(result)]
    for library, means in result["libraries"].items():
        mean = with_interval(means["mean_robust_auc"], means["mean_robust_auc_interval"])
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
    """Yield the rows of `CSV_HEADER`; the first is for the undistorted images."""
    clean = result["clean_auc"], *result["clean_auc_interval"]
    yield "", "none", 0, None, *clean, 0.0, None, None, result["images"]
    for cell in result["cells"]:
        yield tuple(cell[name] for name in CSV_HEADER)


def _headline(result: dict[str, Any]) -> list[str]:
    rows = [
        ["clean", with_interval(result["clean_auc"], result["clean_auc_interval"])],
        ["mean robust", with_interval(result["mean_robust_auc"], result["mean_robust_auc_interval"])],
        ["drop", with_interval(result["mean_drop"], result["mean_drop_interval"])],
    ]
    # Sweeps of earlier versions have the other spelling.
    unlabeled = result.get("unlabeled", result.get("unlabelled"))
    left_out = [
        f"{len(result['unreadable']):,} could not be read" if result["unreadable"] else "",
        f"{result['distorted']:,} of the manifest are already distorted" if result["distorted"] else "",
        f"{unlabeled:,} have no label" if unlabeled else "",
    ]
    reasons = "; ".join(reason for reason in left_out if reason)
    at = result["made_by"]["sweep"]["distort_at"]
    size = "their stored size" if at == "native" else "the input size"
    text = (
        f"{counted(result['images'], 'image')} ({result['real']:,} real, {result['ai']:,} AI-generated) in "
        f"{counted(len(result['cells']), 'cell')}, distorted at {size}."
    )
    return [text + (f" Left out: {reasons}." if reasons else ""), table(["", "AUC [95 %]"], rows)]


def _worst(result: dict[str, Any]) -> str:
    cells = sorted(result["cells"], key=lambda cell: cell["auc"])[:_WORST]
    rows = [
        [
            f"{cell['library']}/{cell['operation']}",
            str(cell["level"]),
            f"{cell['scale']:g}",
            with_interval(cell["auc"], (cell["low"], cell["high"])),
            with_interval(cell["drop"], (cell["drop_low"], cell["drop_high"])),
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
        [operation, *map(number, row), number(sum(row) / len(row))]
        for operation, row in zip(operations, aucs, strict=True)
    ]
    means = [sum(column) / len(column) for column in zip(*aucs, strict=True)]
    rows.append(["mean", *map(number, means), number(sum(means) / len(means))])
    return table(["operation", *(f"level {level}" for level in levels), "mean"], rows)
