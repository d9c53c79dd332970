"""The challenge's label files: a row an image, by the names of their columns."""

import ast
import io
import json
from collections.abc import Iterable

import pandas as pd

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.images import reading as image_io
from featdistill.images.reading import without_extension

_LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
_FLAGS = {**_LABELS, "false": 0, "true": 1, "": None}


def read_table(location: str) -> pd.DataFrame:
    """Read a CSV that has a row an image.

    A byte order mark and an index column without a name are tolerated.

    Args:
        location: path of a file, or `archive.zip::member`.

    Returns:
        All cells as stripped text; the index is `image_name` without its extension.

    Raises:
        UserError: it cannot be read, is no CSV, has no column `image_name`, or names an image twice or not
            at all.
    """
    try:
        data = io.BytesIO(image_io.read_bytes(location))
        table = pd.read_csv(data, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except image_io.BrokenImage as error:
        raise UserError(f"cannot read {location}: {error}") from error
    except ValueError as error:
        raise UserError(f"{location} is no readable CSV: {error}") from error
    table = table.fillna("")
    table.columns = table.columns.str.strip()
    table = table.loc[:, ~table.columns.str.match(r"Unnamed: \d+$")].apply(lambda cells: cells.str.strip())
    _require(table, "image_name", location)
    table.index = pd.Index([without_extension(name) for name in table["image_name"]], dtype="object")
    _refuse(table, "image_name", table["image_name"] == "", location, "the name of an image")
    repeated = table["image_name"][table.index.duplicated()]
    if len(repeated):
        raise UserError(f"{location} names image {repeated.iloc[0]} more than once")
    return table


def read_labels(location: str) -> pd.DataFrame:
    """Read a label file of the challenge, by the names of its columns.

    Returns:
        By `image_name` without its extension: `image_name`, `label` (0 real, 1 AI-generated), `is_distorted`
        (0, 1 or None; without such a column it says whether distortions are listed) and `distortions` (JSON
        list of [name, scale], `[]` without such a column).

    Raises:
        UserError: as `read_table`, or a label is not 0 or 1, or distortions and scales are no two lists of
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
        **{k: pd.Series(v, table.index, "object") for k, v in columns.items()}
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
    for row in zip(table["image_name"], table["distortions"], table["distortion_scales"], strict=True):
        try:
            cells.append(_as_json(*row[1:]))
        except ValueError as error:
            raise UserError(f"{location}: {row[0]}: {error}") from error
    return cells


def _as_json(names: str, scales: str) -> str:
    """Return the manifest's cell for the two cells of a label file."""
    pair = [_literal_list(text) for text in (names, scales)]
    if len(pair[0]) != len(pair[1]):
        raise ValueError(f"{len(pair[0])} distortions, but {len(pair[1])} scales: {names} and {scales}")
    if not all(isinstance(name, str) for name in pair[0]):
        raise ValueError(f"the distortions {names} are not all names")
    try:
        return json.dumps(list(zip(*pair, strict=True)), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the scales {scales} cannot be written as JSON: {error}") from error


def _literal_list(text: str) -> list:
    try:
        value = ast.literal_eval(text or "[]")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{text[:80]!r} is no list")
    return list(value)


def _require(table: pd.DataFrame, column: str, location: str) -> None:
    if column not in table:
        raise UserError(f"{location} has no column {column}; its columns are {', '.join(table.columns)}")


def _refuse(table: pd.DataFrame, column: str, bad: pd.Series, location: str, wanted: str) -> None:
    """Raise a `UserError` that names the first row that is bad."""
    if bad.any():
        number = bad.to_list().index(True)
        row = table.iloc[number]
        image = row["image_name"] or "no name"
        raise UserError(
            f"{location}: row {number + 1} ({image}): {column} is '{row[column]}'; it must be {wanted}"
        )
