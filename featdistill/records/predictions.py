"""The predictions file: one score per image, one column per expert, and what made them.

| file | holds |
|---|---|
| `val.csv` | `name,score` and a column per expert; `score` is P(AI-generated); in the manifest's order |
| `val.csv.json` | the sidecar: `experts` (name -> hash of weights), `preprocessing`, `fusion`, `manifest` |
| `val.errors.csv` | `name,reason` of the images that could not be read; only if there are any |

Scores are float64, written with enough digits to read back exactly: only ranks count, and rounding can lose
one.
"""

import csv
import io
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featdistill import atomic, remote_files
from featdistill.command_line import UserError
from featdistill.images.formats import without_extension
from featdistill.images.listing import printable
from featdistill.records.parts import content_sha256
from featdistill.records.provenance import as_json, read_record

NAME_COLUMNS = ("name", "image_name")
# The second is the column of the data set card's snippet.
SCORE_COLUMNS = ("score", "pred")
# An index column written by `to_csv` without `index=False` has no name, or this one after a second round.
INDEX_HEADERS = ("", "Unnamed: 0")
_MAX_SHOWN = 5


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

    A previous, different sidecar is removed first and the new one is written last: a kill in between never
    leaves scores next to a sidecar of others.

    Args:
        names: N names of images, each once.
        score: (N,) float64, P(AI-generated) after fusion.
        experts: name of the expert -> (N,) float64.
        errors: (name, reason) of each image without a row.

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
        if not np.isfinite(values).all():
            where = name_list(np.array(names, dtype=object)[~np.isfinite(values)])
            raise UserError(f"{column} is not a finite number for {where}; check the expert's weights")
    rows = zip(names, *(values.tolist() for values in arrays.values()), strict=True)
    save_rows(path, ["name", *arrays], rows, sidecar, errors)


def save_rows(
    path: str | Path,
    header: Sequence[str],
    rows: Iterable[Sequence],
    sidecar: dict[str, Any],
    errors: Sequence[tuple[str, str]] = (),
) -> None:
    """Write checked rows like `write_predictions`; `rows` are read one after the other."""
    if read_sidecar(path) != as_json(sidecar):
        sidecar_path(path).unlink(missing_ok=True)
    if errors:
        atomic.write_text(errors_path(path), atomic.csv_text(["name", "reason"], errors))
    else:
        errors_path(path).unlink(missing_ok=True)
    with atomic.replace_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    # Sorted, because a continued run has parts of it from the journal, in another order.
    atomic.write_json(sidecar_path(path), sidecar, sort_keys=True)


def read_predictions(path: str | Path) -> pd.DataFrame:
    """Read predictions of ours (`name`, `score`, experts) or a submission (`image_name`, `score` or `pred`).

    Returns:
        A frame with `name` (text, as in the file), `score` and the experts' columns (all float64), without
        an unnamed index column; `frame.attrs["path"]` is the file.

    Raises:
        UserError: the file is missing or neither of the two, a name appears twice, or a score is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"predictions {path} do not exist")
    header, rows = parse_csv(path.read_bytes(), str(path))
    name_column = _the_one(NAME_COLUMNS, header, "name", path)
    score_column = _the_one(SCORE_COLUMNS, header, "score", path)
    first = 1 if header[0] in INDEX_HEADERS else 0
    others = [column for column in header[first:] if column not in (name_column, score_column)]
    if others and name_column == "image_name":
        raise UserError(
            f"{path}: a submission holds a name and a score, not {', '.join(map(repr, others))} as well"
        )
    table = pd.DataFrame(rows, columns=header, dtype=object)
    names = table[name_column]
    repeated = names[names.duplicated()]
    if len(repeated):
        raise UserError(f"{path}: repeated names ({len(repeated)}): {name_list(repeated)}")
    frame = pd.DataFrame({"name": names})
    for column in (score_column, *others):
        values = to_numbers(table[column])
        broken = table[~np.isfinite(values)]
        if len(broken):
            text, where = broken[column].iloc[0], name_list(broken[name_column])
            raise UserError(f"{path}: column {column} contains {text!r}, not a finite number, for {where}")
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
    """Return the sidecar of the predictions at `path`, or None; see `read_record`."""
    return read_record(sidecar_path(path))


def manifest_entry(manifest: str | Path, path: str | Path) -> dict[str, str]:
    """Return the sidecar's `manifest` entry for predictions at `path`: `{"path": ..., "sha256": ...}`.

    The path is relative if the manifest is in or below the sidecar's folder, so that the folder can be moved.
    """
    if remote_files.is_remote(manifest):
        return {"path": os.fspath(manifest), "sha256": content_sha256(manifest)}
    absolute, folder = Path(os.path.abspath(manifest)), Path(os.path.abspath(path)).parent
    inside = absolute.is_relative_to(folder)
    shown = absolute.relative_to(folder) if inside else absolute
    return {"path": shown.as_posix(), "sha256": content_sha256(absolute)}


def manifest_of(path: str | Path) -> str | Path | None:
    """Return the path or address of the manifest named in the sidecar of the predictions at `path`, or None.

    Raises:
        UserError: the manifest is gone, or has changed since.
    """
    entry = (read_sidecar(path) or {}).get("manifest")
    if not entry:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise UserError(f"{sidecar_path(path)}: manifest must be an object with path and sha256")
    manifest = remote_files.located(entry["path"])
    if isinstance(manifest, Path):
        manifest = Path(os.path.normpath(Path(path).parent / manifest))
    try:
        sha256 = content_sha256(manifest)
    except FileNotFoundError as error:
        raise UserError(
            f"manifest {manifest}, named in {sidecar_path(path)}, does not exist; name its new path"
        ) from error
    if sha256 != entry.get("sha256"):
        raise UserError(
            f"manifest {manifest} has changed since {path} was predicted; predict again or name another one"
        )
    return manifest


def name_key(name: str) -> str:
    """Return what spellings of a name share: no extension, escaped control characters, composed accents."""
    return unicodedata.normalize("NFC", printable(without_extension(name)))


def match_names(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """Return the position of each of `names` in `known`, (N,) int64; -1 if it is not there.

    A name matches itself, or else the only known name with the same `name_key`.
    """
    exact = {name: position for position, name in enumerate(known)}
    loose: dict[str, int] = {}
    for position, name in enumerate(known):
        stem = name_key(name)
        loose[stem] = -1 if stem in loose else position
    return np.array(
        [exact.get(name, loose.get(name_key(name), -1)) for name in names], dtype=np.int64
    ).reshape(len(names))


def name_list(names: Iterable[str]) -> str:
    """Return up to five names for an error message, and how many more there are."""
    names = list(names)
    more = len(names) - _MAX_SHOWN
    return ", ".join(names[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")


def parse_csv(data: bytes, where: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a CSV file as text, without byte order mark and blank lines.

    Raises:
        UserError: it is not a CSV in UTF-8, a column appears twice, or a row has another number of fields.
    """
    try:
        text = io.StringIO(data.decode("utf-8-sig"), newline="")
        lines = [line for line in csv.reader(text, strict=True) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where} is not a readable CSV in UTF-8: {error}") from error
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
    """Return texts as (N,) float64, exactly as written; NaN for what is not a number."""
    return np.array([_number(text) for text in texts], dtype=np.float64)


def _number(text: str) -> float:
    try:
        # Python accepts 1_000 as a number; no reader of CSV files does.
        return float("nan") if "_" in text else float(text)
    except ValueError:
        return float("nan")


def _the_one(known: tuple[str, ...], header: list[str], what: str, path: Path) -> str:
    present = [column for column in known if column in header]
    if len(present) != 1:
        names = " or ".join(known)
        raise UserError(
            f"{path} is not a predictions file: it needs one {what} column, {names}; "
            f"its columns are {','.join(header)}"
        )
    return present[0]
