"""Tables in Markdown that are as easy to read in a terminal."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns, the first to the left, the others to the right."""
    lines = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in (header, *rows)]
    # Markdown wants two characters at least, to say how a column is aligned.
    width = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = [":" + "-" * (width[0] - 1), *("-" * (size - 1) + ":" for size in width[1:])]
    padded = [
        [line[0].ljust(width[0]), *(cell.rjust(size) for cell, size in zip(line[1:], width[1:], strict=True))]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)
