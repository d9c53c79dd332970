"""Images that are alike in a column of a table, such as `scale`: text as it is, numbers in bins.

Figures over the pairs within a stratum, breakdowns by a column, balanced draws and probes all use these bins.
"""

import numpy as np
import pandas as pd

from featdistill.command_line import UserError, nearest
from featdistill.records.predictions import to_numbers

# Bins of equal numbers of images.
BINS = 5
# Whole numbers with at most so many different values, such as folds and levels, are not put in bins.
_MAX_WHOLE_VALUES = 10


def column_strata(rows: pd.DataFrame, column: str, where: str = "the manifest") -> pd.Series:
    """Return the stratum of each row by a column; see `strata`.

    Args:
        where: what the rows were read from, for the messages.

    Raises:
        UserError: there is no such column, it is empty, or some cells are not numbers where most are.
    """
    values = require_column(rows, column, where)
    try:
        return strata(values)
    except ValueError as error:
        raise UserError(f"column {column} of {where}: {error}") from error


def require_column(rows: pd.DataFrame, column: str, where: str) -> pd.Series:
    """Return a column; raise a `UserError` that names the nearest one if there is no such column."""
    if column not in rows:
        raise UserError(
            f"there is no column {column!r} in {where}{nearest(column, rows)}; "
            f"the columns are {', '.join(rows)}"
        )
    return rows[column]


def strata(values: pd.Series, bins: int = BINS) -> pd.Series:
    """Return the stratum of each value.

    Numbers are put in `bins` bins with about as many rows each (equal numbers are never divided), unless they
    have at most `bins` different values, or are whole and have at most ten. Text is a stratum as it is.

    Args:
        values: (N,) text or numbers; empty text and NaN are unknown.

    Returns:
        (N,) with the index of `values`, an ordered categorical: the name of each row's stratum, missing where
        the value is unknown. The categories rise, and each has rows. A bin has the name of its lowest and
        highest number, such as `0.25 to 0.391`.

    Raises:
        ValueError: all values are unknown, or some are not numbers where most are.
    """
    is_number = pd.api.types.is_numeric_dtype(values.dtype)
    text = values.astype("object").where(values.notna(), "").astype(str).str.strip()
    numbers = values.to_numpy(np.float64, na_value=np.nan) if is_number else to_numbers(text)
    is_known, is_finite = (text != "").to_numpy(), np.isfinite(numbers)
    if not is_known.any():
        raise ValueError("all cells are empty")
    odd = text[is_known & ~is_finite]
    if len(odd) and 2 * len(odd) < is_known.sum():
        raise ValueError(
            f"{odd.iloc[0]!r} is not a number ({len(odd)} of {is_known.sum()} cells, the others are); "
            "correct or empty such cells"
        )
    if len(odd):
        known = text.where(is_known)
        return pd.Series(pd.Categorical(known, sorted(known.dropna().unique()), ordered=True), values.index)
    codes, names = _bins(numbers, is_finite, bins)
    return pd.Series(pd.Categorical.from_codes(codes, names, ordered=True), values.index)


def _bins(numbers: np.ndarray, is_known: np.ndarray, bins: int) -> tuple[np.ndarray, list[str]]:
    """Return the bin of each number, -1 where it is unknown, and the names of the bins."""
    known = numbers[is_known]
    distinct = np.unique(known)
    is_whole = bool((distinct == np.round(distinct)).all())
    if len(distinct) <= bins or (is_whole and len(distinct) <= _MAX_WHOLE_VALUES):
        last = distinct
    else:
        last = np.unique(np.quantile(known, np.arange(1, bins + 1) / bins, method="inverted_cdf"))
    codes = np.full(len(numbers), -1)
    codes[is_known] = np.searchsorted(last, known)
    ends = [(known[codes[is_known] == code].min(), high) for code, high in enumerate(last)]
    for digits in (4, 8, 17):
        names = [
            _shown(low, digits) + ("" if low == high else f" to {_shown(high, digits)}") for low, high in ends
        ]
        if len(set(names)) == len(names):
            break
    return codes, names


def _shown(value: float, digits: int) -> str:
    """Return a number with so many significant digits, and whole numbers in full."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:.{digits}g}"
