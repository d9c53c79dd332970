"""Markdown tables that are also readable in a terminal."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns: the first to the left, the others to the right."""
    lines = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in (header, *rows)]
    # The rule that sets the alignment of a column needs two characters.
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def number(value: float | None) -> str:
    """Return a metric with four decimals, or `n/a` for None."""
    return "n/a" if value is None else f"{value:.4f}"


def with_interval(value: float | None, bounds: Sequence[float | None] | None) -> str:
    """Return `0.9000 [0.8500, 0.9400]`, without the interval where it is None."""
    if value is None or not bounds or bounds[0] is None:
        return number(value)
    return f"{value:.4f} [{bounds[0]:.4f}, {bounds[1]:.4f}]"


def difference(value: float | None, bounds: Sequence[float | None]) -> str:
    """Return `+0.0500 [-0.0100, +0.1100]`, without the interval where it is None."""
    if value is None or bounds[0] is None:
        return "n/a" if value is None else f"{value:+z.4f}"
    return f"{value:+z.4f} [{bounds[0]:+z.4f}, {bounds[1]:+z.4f}]"
