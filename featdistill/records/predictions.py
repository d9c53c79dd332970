"""The predictions file: one score an image, one column an expert, and beside it what made them.

Three files belong together, here for `val.csv`:

| file | holds |
|---|---|
| `val.csv` | `name,score` and a column per expert; `score` is P(AI-generated); in the manifest's order |
| `val.csv.json` | the sidecar: `experts` (name -> hash of weights), `preprocessing`, `fusion`, `manifest` |
| `val.errors.csv` | `name,reason` of the images that could not be read; there only where there are any |

Scores are float64 and written with as many digits as give the same number back: only ranks count, so a score
that is rounded on its way to the file can lose a rank.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.images.reading import without_extension

NAME_COLUMNS = ("name", "image_name")
# The second is the column of the data set card's snippet.
SCORE_COLUMNS = ("score", "pred")
# A header that is empty or pandas' name for one: an index column written by `to_csv` without `index=False`.
INDEX_HEADERS = ("", "Unnamed: 0")
_SHOWN_NAMES = 5
_SHOWN_KEYS = 3


def sidecar_path(path: str | Path) -> Path:
    """Return the sidecar's path: `val.csv` -> `val.csv.json`."""
    path = Path(path)
    return path.with_name(f"{path.name}.json")


def errors_path(path: str | Path) -> Path:
    """Return the path of the list of unreadable images: `val.csv` -> `val.errors.csv`."""
    path = Path(path)
    return path.with_name(f"{path.stem}.errors.csv")


def write_predictions(
    path: str | Path,
    names: Sequence[str],
    score: np.ndarray,
    experts: dict[str, np.ndarray],
    sidecar: dict[str, Any],
    errors: Sequence[tuple[str, str]] = (),
) -> None:
    """Write predictions, their sidecar and the list of unreadable images, each atomically.

    A former sidecar that differs is removed first and the new one is written last, so that a run that is
    killed in between never leaves scores beside a sidecar that they do not belong to.

    Args:
        names: N names of images, each once.
        score: (N,) float64, P(AI-generated) after fusion.
        experts: name of the expert -> (N,) float64.
        errors: (name, reason) of each image that has no row.

    Raises:
        UserError: a score is not finite.
        ValueError: lengths differ, a name appears twice, or an expert is called `name` or `score`.
    """
    names = [str(name) for name in names]
    columns = {"score": score, **experts}
    if len(columns) != len(experts) + 1 or "name" in columns:
        raise ValueError("an expert must not be called 'name' or 'score'")
    if len(set(names)) != len(names):
        raise ValueError("a name appears twice in the predictions")
    arrays = {column: np.asarray(values, dtype=np.float64) for column, values in columns.items()}
    for column, values in arrays.items():
        if values.shape != (len(names),):
            raise ValueError(f"{column} has shape {values.shape} for {len(names)} names")
        broken = ~np.isfinite(values)
        if broken.any():
            where = name_list(np.asarray(names, dtype=object)[broken])
            raise UserError(f"{column} is not a finite number for {where}; look at the expert's weights")
    if read_sidecar(path) != _as_json(sidecar):
        sidecar_path(path).unlink(missing_ok=True)
    if errors:
        atomic.write_text(errors_path(path), atomic.csv_text(["name", "reason"], errors))
    else:
        errors_path(path).unlink(missing_ok=True)
    rows = zip(names, *(values.tolist() for values in arrays.values()), strict=True)
    atomic.write_text(path, atomic.csv_text(["name", *arrays], rows))
    # Sorted: a continued run takes some of it from the journal, whose order is another.
    atomic.write_json(sidecar_path(path), sidecar, sort_keys=True)


def read_predictions(path: str | Path) -> pd.DataFrame:
    """Read predictions of ours or a submission CSV.

    Ours has `name`, `score` and a column per expert. A submission has `image_name` and `score` or `pred`. An
    unnamed index column is left out.

    Returns:
        A frame with `name` (text, as written in the file), `score` and the experts' columns (all float64);
        `frame.attrs["path"]` is the file.

    Raises:
        UserError: the file is missing or neither of the two, a name appears twice, or a score is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"predictions {path} do not exist")
    header, rows = parse_csv(path.read_bytes(), str(path))
    first = 1 if header and header[0] in INDEX_HEADERS else 0
    name_column = _the_one(NAME_COLUMNS, header, "name", path)
    score_column = _the_one(SCORE_COLUMNS, header, "score", path)
    others = [column for column in header[first:] if column not in (name_column, score_column)]
    if others and name_column == "image_name":
        raise UserError(
            f"{path}: a submission holds a name and a score, not {', '.join(map(repr, others))} as well"
        )
    columns = {column: [row[place] for row in rows] for place, column in enumerate(header)}
    names = np.array(columns[name_column], dtype=object)
    repeated = pd.Series(names).duplicated().to_numpy()
    if repeated.any():
        raise UserError(f"{path}: repeated names ({repeated.sum()}): {name_list(names[repeated])}")
    frame = pd.DataFrame({"name": columns[name_column]}, dtype=object)
    for column in (score_column, *others):
        values = to_numbers(columns[column])
        broken = ~np.isfinite(values)
        if broken.any():
            bad = columns[column][int(broken.argmax())]
            where = name_list(names[broken])
            raise UserError(f"{path}: column {column} holds {bad!r}, which is no finite number, for {where}")
        frame["score" if column == score_column else column] = values
    frame.attrs["path"] = str(path)
    return frame


def read_errors(path: str | Path) -> list[tuple[str, str]]:
    """Return (name, reason) of the images that could not be read for the predictions at `path`."""
    listed = errors_path(path)
    if not listed.is_file():
        return []
    header, rows = parse_csv(listed.read_bytes(), str(listed))
    if header != ["name", "reason"]:
        raise UserError(f"{listed} must have the columns name,reason; it has {','.join(header)}")
    return [(name, reason) for name, reason in rows]


def read_sidecar(path: str | Path) -> dict[str, Any] | None:
    """Return the sidecar of the predictions at `path`, or None where there is none.

    Raises:
        UserError: it is no JSON object.
    """
    file = sidecar_path(path)
    if not file.is_file():
        return None
    try:
        sidecar = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no readable JSON: {error}; remove it and predict again") from error
    if not isinstance(sidecar, dict):
        raise UserError(f"{file} must hold a JSON object; remove it and predict again")
    return sidecar


def manifest_entry(manifest: str | Path, path: str | Path) -> dict[str, str]:
    """Return the sidecar's `manifest` entry for predictions at `path`: `{"path": ..., "sha256": ...}`.

    The path is relative to the sidecar's folder where the manifest lies in or below it, so that the
    folder can be moved; absolute otherwise.
    """
    absolute, folder = Path(os.path.abspath(manifest)), Path(os.path.abspath(path)).parent
    inside = absolute.is_relative_to(folder)
    shown = absolute.relative_to(folder) if inside else absolute
    return {"path": shown.as_posix(), "sha256": atomic.sha256_of(absolute)}


def manifest_of(path: str | Path) -> Path | None:
    """Return the manifest that the sidecar of the predictions at `path` names; None where it names none.

    Raises:
        UserError: the manifest is gone, or its bytes are no longer those that were predicted.
    """
    entry = (read_sidecar(path) or {}).get("manifest")
    if not entry:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise UserError(f"{sidecar_path(path)}: manifest must be an object with path and sha256")
    manifest = Path(os.path.normpath(Path(path).parent / entry["path"]))
    if not manifest.is_file():
        raise UserError(
            f"manifest {manifest}, named in {sidecar_path(path)}, does not exist; give its new path"
        )
    if atomic.sha256_of(manifest) != entry.get("sha256"):
        raise UserError(
            f"manifest {manifest} has changed since {path} was predicted; predict again or name another one"
        )
    return manifest


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Return one line that names the first keys in which two sidecars differ, with both values, or None.

    Where the manifest's SHA-256 is the same, its path does not count: the same rows may lie somewhere else.
    """
    former, current = _flat(_as_json(old)), _flat(_as_json(new))
    if "manifest.sha256" in former and former["manifest.sha256"] == current.get("manifest.sha256"):
        former.pop("manifest.path", None)
        current.pop("manifest.path", None)
    keys = [key for key in {**former, **current} if former.get(key) != current.get(key)]
    if not keys:
        return None
    shown = [f"{key} was {_short(former, key)}, is {_short(current, key)}" for key in keys[:_SHOWN_KEYS]]
    more = f"; and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return "; ".join(shown) + more


def match_names(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """Return for each of `names` its position in `known`, (N,) int64; -1 where it is not there.

    A name matches itself first, and otherwise the only known name that is the same without the extension.
    """
    exact = {name: position for position, name in enumerate(known)}
    loose: dict[str, int] = {}
    for position, name in enumerate(known):
        stem = without_extension(name)
        loose[stem] = -1 if stem in loose else position
    return np.array(
        [exact.get(name, loose.get(without_extension(name), -1)) for name in names], dtype=np.int64
    ).reshape(len(names))


def name_list(names: Iterable[str]) -> str:
    """Return up to five names for an error message, and how many more there are."""
    names = list(names)
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def parse_csv(data: bytes, where: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a CSV file's bytes as text, without byte order mark and blank lines.

    Raises:
        UserError: no UTF-8, no CSV, a column appears twice, or a row has another number of fields.
    """
    try:
        lines = [
            line
            for line in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
            if line
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where} is no readable CSV in UTF-8: {error}") from error
    if not lines:
        raise UserError(f"{where} is empty")
    header, rows = lines[0], lines[1:]
    if len(set(header)) != len(header):
        raise UserError(f"{where}: a column appears twice in the header {','.join(header)}")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise UserError(f"{where}: row {number} has {len(row)} fields where the header has {len(header)}")
    return header, rows


def to_numbers(texts: Iterable[str]) -> np.ndarray:
    """Return texts as (N,) float64, exactly as written; NaN for what is no number."""
    return np.array([_number(text) for text in texts], dtype=np.float64)


def _number(text: str) -> float:
    try:
        # Python takes 1_000 for a number; no reader of CSV files does.
        return float("nan") if "_" in text else float(text)
    except ValueError:
        return float("nan")


def _the_one(known: tuple[str, ...], header: list[str], what: str, path: Path) -> str:
    found = [column for column in known if column in header]
    if len(found) != 1:
        wanted, columns = " or ".join(known), ",".join(header)
        raise UserError(
            f"{path} is no predictions file: it needs one {what} column, {wanted}; its columns are {columns}"
        )
    return found[0]


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return what a JSON file gives back, so that a tuple in memory equals the list that was read."""
    return json.loads(json.dumps(value))


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Flatten nested objects to `a.b.c` -> JSON text."""
    if not isinstance(value, dict) or (prefix and not value):
        return {prefix: json.dumps(value, ensure_ascii=False)}
    flat: dict[str, str] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}.{key}" if prefix else key))
    return flat


def _short(flat: dict[str, str], key: str) -> str:
    """Return a value for a message: a SHA-256 by its first twelve digits, `absent` where there is none."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", flat.get(key, "absent"))
