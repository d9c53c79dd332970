"""The ledger of submissions: a CSV beside the zips with a line for each, of what it is and what made it.

| column | holds |
|---|---|
| `date` | when it was first written, UTC, as in `2026-03-01T12:00:00Z` |
| `file` | the zip, relative to the ledger's folder where it lies in or below it |
| `sha256` | of the zip |
| `profile` | its name, and what was set otherwise: `test-card extension=keep` |
| `slots` | `val=submission.csv:10000; ...`: slot, file in the zip, rows |
| `experts` | `clip_l14_a:0123456789ab; ...`: of the predictions' sidecars, with short hashes of weights |
| `local_aucs` | `val clean 0.9729 robust 0.8679; ...`: of a `metrics.json` that was at hand |
| `note` | in the user's words |

Further columns and their cells survive. A zip of the same bytes, of the same profile and on the same day is
not listed twice: its line is brought up to date.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import IO

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.records.predictions import parse_csv, read_sidecar, sidecar_path
from featdistill.submission.check import CheckedFile

COLUMNS = ("date", "file", "sha256", "profile", "slots", "experts", "local_aucs", "note")
# Without these a CSV is something else, which must not be written to.
_NEEDED = ("date", "file", "sha256", "profile")
# Submissions that the challenge takes a day (its rules on Codabench).
DAILY_LIMIT = 5
_SHORT_HASH = 12
_SLOT = re.compile(r"(\w+)=(.+?\.csv):\d+(?:; |$)")


def read_ledger(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and the lines of a ledger, the oldest first; one that is not there has no lines.

    Raises:
        UserError: it is damaged, or no ledger.
    """
    path = Path(path)
    if not path.exists():
        return list(COLUMNS), []
    header, rows = parse_csv(path.read_bytes(), f"ledger {path}")
    absent = [column for column in _NEEDED if column not in header]
    if absent:
        raise UserError(
            f"{path} is no ledger of submissions: column {', '.join(absent)} is missing; "
            "move it away or name another with --ledger"
        )
    return header, [dict(zip(header, row, strict=True)) for row in rows]


def add(path: str | Path, line: dict[str, str]) -> int:
    """List a submission: the file is read, added to and replaced, by one process at a time.

    Args:
        line: `COLUMNS` -> text. Of a submission that is listed already, its empty cells change nothing.

    Returns:
        How many submissions are listed for the (UTC) day of `line`.

    Raises:
        UserError: the file is damaged or no ledger; it stays as it is.
    """
    # A link is followed, so that it is not replaced by a file of its own.
    path = Path(os.path.realpath(path))
    line = {column: _clean(text) for column, text in line.items()}
    day = _day(line["date"])
    with _locked(path):
        header, rows = read_ledger(path)
        header += [column for column in COLUMNS if column not in header]
        identity = line["sha256"], line["profile"], day
        for row in rows:
            if (row["sha256"], row["profile"], _day(row["date"])) == identity:
                row.update({column: text for column, text in line.items() if text and column != "date"})
                break
        else:
            rows.append(line)
        cells = [[_clean(row.get(column, "")) for column in header] for row in rows]
        atomic.write_text(path, atomic.csv_text(header, cells))
    return sum(_day(row["date"]) == day for row in rows)


def entry(
    path: str | Path,
    archive: str | Path,
    files: Iterable[CheckedFile],
    *,
    when: datetime,
    profile: str,
    predictions: Iterable[str | Path] = (),
    local_aucs: str = "",
    note: str = "",
) -> dict[str, str]:
    """Return the line of a submission.

    Args:
        path: the ledger's.
        archive: the zip, in its place.
        when: with its time zone.
        profile: as `submission_profiles.label` gives it.
        predictions: what the zip was made of.
        local_aucs: as `read_aucs` gives it.
    """
    folder, absolute = Path(os.path.realpath(path)).parent, Path(os.path.realpath(archive))
    shown = absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute
    return {
        "date": when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "file": shown.as_posix(),
        "sha256": atomic.sha256_of(archive),
        "profile": profile,
        "slots": "; ".join(f"{file.slot}={file.file}:{file.rows}" for file in files),
        "experts": _experts(predictions),
        "local_aucs": local_aucs,
        "note": note,
    }


def slots_of(line: dict[str, str]) -> dict[str, str]:
    """Return slot -> file in the zip, of a line."""
    return dict(_SLOT.findall(line.get("slots", "")))


def parse_date(text: str) -> datetime:
    """Return a date and time in UTC from ISO 8601; what has no zone is in UTC, what has no time is at 0:00.

    Raises:
        UserError: it is none.
    """
    try:
        when = datetime.fromisoformat(text)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UserError(f"'{text}' is no date; give it as in 2026-03-01 or 2026-03-01T12:00:00Z") from error


def read_aucs(path: str | Path) -> str:
    """Return clean and robust AUC of each split of a `metrics.json`, in one line of text.

    Raises:
        UserError: the file is missing or holds no splits with AUCs.
    """
    try:
        splits = json.loads(Path(path).read_text(encoding="utf-8"))["splits"]
        aucs = {name: (split["clean_auc"], split["robust_auc"]) for name, split in splits.items()}
        texts = {name: [_auc(value) for value in values] for name, values in aucs.items()}
    except FileNotFoundError as error:
        raise UserError(f"--scores {path} does not exist") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--scores {path} is no metrics.json of evaluate.py; score the predictions"
        ) from error
    return "; ".join(f"{name} clean {clean} robust {robust}" for name, (clean, robust) in texts.items())


def _auc(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _experts(predictions: Iterable[str | Path]) -> str:
    """Return the experts of predictions, each once; predictions of unknown origin add none."""
    found = []
    for path in predictions:
        hashes = (read_sidecar(path) or {}).get("experts", {})
        if not isinstance(hashes, dict):
            raise UserError(f"{sidecar_path(path)}: experts must be an object of names and hashes")
        found += [f"{name}:{str(digest)[:_SHORT_HASH]}" for name, digest in hashes.items()]
    return "; ".join(dict.fromkeys(found))


def _day(text: str) -> date | None:
    """Return the day of a date; None of one that a hand has made unreadable, which counts for no day."""
    try:
        return parse_date(text).date()
    except UserError:
        return None


def _clean(text: str) -> str:
    """Return a cell that every reader of CSV files gives back: in UTF-8 and without carriage returns."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from adding to a ledger; the lock goes with the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.lock")
    while True:
        with beside.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(lock, beside):
                try:
                    yield
                finally:
                    beside.unlink()
                return


def _is_at(lock: IO, path: Path) -> bool:
    """Tell whether a file is still the one of its name: who held a lock before has removed what it was on."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False
