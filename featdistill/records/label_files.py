"""The challenge's label files: one row per image, columns found by their names."""

import ast
import json
from collections.abc import Iterable

import pandas as pd

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.images import reading as image_io
from featdistill.records.predictions import INDEX_HEADERS, name_key, parse_csv

_LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
_FLAGS = {**_LABELS, "false": 0, "true": 1, "": None}


def read_table(location: str) -> pd.DataFrame:
    """Read a CSV with one row per image; a byte order mark and unnamed index columns are ignored.

    Args:
        location: path of a file, or `archive.zip::member`.

    Returns:
        All cells as stripped text; the index is the `name_key` of `image_name`.

    Raises:
        UserError: it cannot be read, is not a CSV, has no column `image_name`, or an image is named twice or
            not at all.
    """
    try:
        header, rows = parse_csv(image_io.read_bytes(location), location)
    except image_io.BrokenImage as error:
        raise UserError(f"cannot read {location}: {error}") from error
    table = pd.DataFrame(rows, columns=[column.strip() for column in header], dtype="object")
    table = table[[column for column in table if column not in INDEX_HEADERS]]
    table = table.apply(lambda cells: cells.str.strip())
    _require(table, "image_name", location)
    table.index = pd.Index([name_key(name) for name in table["image_name"]], dtype="object")
    _refuse(table, "image_name", table["image_name"] == "", location, "the name of an image")
    repeated = table["image_name"][table.index.duplicated()]
    if len(repeated):
        raise UserError(f"{location} names image {repeated.iloc[0]} more than once")
    return table


def read_labels(location: str) -> pd.DataFrame:
    """Read a label file of the challenge.

    Returns:
        By the `name_key` of `image_name`: `image_name`, `label` (0 real, 1 AI-generated), `is_distorted`
        (0, 1 or None; without such a column, whether distortions are listed) and `distortions` (JSON list of
        [name, scale]; `[]` without such a column).

    Raises:
        UserError: as `read_table`, or a label is not 0 or 1, or distortions and scales are not two lists of
            equal length.
    """
    table = read_table(location)
    _require(table, "label", location)
    labels = [_LABELS.get(text) for text in table["label"]]
    _refuse(table, "label", pd.Series(labels).isna(), location, "0 (real) or 1 (AI-generated)")
    distortions = _distortions(table, location)
    if "is_distorted" in table:
        flags = table["is_distorted"].str.lower()
        _refuse(table, "is_distorted", ~flags.isin(list(_FLAGS)), location, "0 or 1")
        is_distorted = [_FLAGS[text] for text in flags]
    elif "distortions" in table:
        is_distorted = [int(cell != "[]") for cell in distortions]
    else:
        is_distorted = [None] * len(table)
    columns = {"label": labels, "is_distorted": is_distorted, "distortions": distortions}
    return table[["image_name"]].assign(
        **{name: pd.Series(values, table.index, "object") for name, values in columns.items()}
    )


def format_labels(rows: Iterable[tuple[str, int | str, list[list], int | str]]) -> str:
    """Return the text of a label file as the challenge writes those of its evaluation splits.

    Args:
        rows: (image name, label, [[distortion, scale], ...], is_distorted) of each image.
    """
    header = ("image_name", "label", "distortions", "distortion_scales", "is_distorted")
    lines = (
        (name, label, [step for step, _ in chain], [scale for _, scale in chain], is_distorted)
        for name, label, chain, is_distorted in rows
    )
    return atomic.csv_text(header, lines)


def _distortions(table: pd.DataFrame, location: str) -> list[str]:
    if "distortions" not in table:
        return ["[]"] * len(table)
    _require(table, "distortion_scales", location)
    cells = []
    for name, *lists in table[["image_name", "distortions", "distortion_scales"]].itertuples(index=False):
        try:
            cells.append(_manifest_cell(*lists))
        except ValueError as error:
            raise UserError(f"{location}: {name}: {error}") from error
    return cells


def _manifest_cell(names: str, scales: str) -> str:
    """Return two cells of a label file as the one cell of a manifest."""
    distortions, values = _literal_list(names), _literal_list(scales)
    if len(distortions) != len(values):
        raise ValueError(f"{len(distortions)} distortions, but {len(values)} scales: {names} and {scales}")
    if not all(isinstance(name, str) for name in distortions):
        raise ValueError(f"the distortions {names} are not all names")
    try:
        return json.dumps(list(zip(distortions, values, strict=True)), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the scales {scales} cannot be written as JSON: {error}") from error


def _literal_list(text: str) -> list:
    try:
        value = ast.literal_eval(text or "[]")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{text[:80]!r} is not a list")
    return list(value)


def _require(table: pd.DataFrame, column: str, location: str) -> None:
    if column not in table:
        raise UserError(f"{location} has no column {column}; its columns are {', '.join(table.columns)}")


def _refuse(table: pd.DataFrame, column: str, bad: pd.Series, location: str, expected: str) -> None:
    """Raise a `UserError` that names the first bad row."""
    if bad.any():
        number = bad.to_list().index(True)
        row = table.iloc[number]
        image = row["image_name"] or "no name"
        raise UserError(
            f"{location}: row {number + 1} ({image}): {column} is '{row[column]}'; it must be {expected}"
        )
