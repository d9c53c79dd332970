"""The ledger of submissions: a CSV next to the zips, with one row per submission.

| column | holds |
|---|---|
| `date` | when it was first written, UTC, as in `2026-03-01T12:00:00Z` |
| `file` | the zip; its path is relative if it is in the ledger's folder or below |
| `sha256` | of the zip |
| `profile` | its name, and what was changed: `test-card extension=keep` |
| `slots` | `val=submission.csv:10000; ...`: slot, file in the zip, rows |
| `experts` | `clip_l14_a:0123456789ab; ...`: from the predictions' sidecars, with short hashes of weights |
| `local_aucs` | `val clean 0.9729 robust 0.8679; ...`: from a `metrics.json` |
| `note` | in the user's words |

Other columns are preserved. The same zip with the same profile on the same day is listed once: its row is
updated.
"""

import json
import os
import re
from collections.abc import Iterable
from datetime import UTC, date, datetime
from pathlib import Path

import pandas as pd
from filelock import FileLock

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.records.predictions import parse_csv, read_sidecar, sidecar_path

COLUMNS = ("date", "file", "sha256", "profile", "slots", "experts", "local_aucs", "note")
# Without these, a CSV is something else, which must not be overwritten.
_REQUIRED = ("date", "file", "sha256", "profile")
_SHORT_HASH = 12
# Adding a row takes milliseconds, so a lock held this long will not be released.
_MAX_WAIT_S = 60
_SLOT = re.compile(r"(\w+)=(.+?\.csv):\d+(?:; |$)")


def read_ledger(path: str | Path) -> pd.DataFrame:
    """Return a ledger as text columns, oldest row first; without rows if the file does not exist.

    Raises:
        UserError: the file is damaged or is not a ledger.
    """
    path = Path(path)
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS, dtype=object)
    header, rows = parse_csv(path.read_bytes(), f"ledger {path}")
    missing = [column for column in _REQUIRED if column not in header]
    if missing:
        raise UserError(
            f"{path} is not a ledger of submissions: column {', '.join(missing)} is missing; "
            "move it away or choose another with --ledger"
        )
    ledger = pd.DataFrame(rows, columns=header, dtype=object)
    return ledger.reindex(columns=list(dict.fromkeys([*header, *COLUMNS])), fill_value="")


def add(path: str | Path, entry: dict[str, str]) -> int:
    """List a submission; processes that do so at the same time take turns.

    Args:
        entry: `COLUMNS` -> text. Empty cells do not overwrite those of a submission that is already listed.

    Returns:
        How many submissions are listed for the (UTC) day of `entry`.

    Raises:
        UserError: the file is damaged or is not a ledger; it is left as it is.
    """
    # A link is followed rather than replaced by a file.
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {column: _clean(text) for column, text in entry.items()}
    with FileLock(path.with_name(f".{path.name}.lock"), poll_interval=0.01, timeout=_MAX_WAIT_S):
        ledger = read_ledger(path)
        is_today = ledger["date"].map(_day) == _day(entry["date"])
        is_same = is_today & (ledger["sha256"] == entry["sha256"]) & (ledger["profile"] == entry["profile"])
        if is_same.any():
            changes = {column: text for column, text in entry.items() if text and column != "date"}
            ledger.loc[is_same.idxmax(), list(changes)] = list(changes.values())
        else:
            ledger = pd.concat([ledger, pd.DataFrame([entry], dtype=object)], ignore_index=True).fillna("")
        atomic.write_text(path, ledger.map(_clean).to_csv(index=False, lineterminator="\n"))
    return int(is_today.sum()) + (not is_same.any())


def experts_of(predictions: Iterable[str | Path]) -> str:
    """Return the experts of predictions, each once, in one line; predictions without a sidecar add none.

    Raises:
        UserError: a sidecar is damaged.
    """
    experts = []
    for path in predictions:
        hashes = (read_sidecar(path) or {}).get("experts", {})
        if not isinstance(hashes, dict):
            raise UserError(f"{sidecar_path(path)}: experts must be an object of names and hashes")
        experts += [f"{name}:{str(digest)[:_SHORT_HASH]}" for name, digest in hashes.items()]
    return "; ".join(dict.fromkeys(experts))


def slots_of(entry: dict[str, str]) -> dict[str, str]:
    """Return slot -> file in the zip, of an entry."""
    return dict(_SLOT.findall(entry["slots"]))


def parse_date(text: str) -> datetime:
    """Return a date and time in UTC from ISO 8601; the default zone is UTC, the default time 0:00.

    Raises:
        UserError: it is not a date.
    """
    try:
        when = datetime.fromisoformat(text)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UserError(f"'{text}' is not a date such as 2026-03-01 or 2026-03-01T12:00:00Z") from error


def read_aucs(path: str | Path) -> str:
    """Return the clean and robust AUC of each split of a `metrics.json`, in one line of text.

    Raises:
        UserError: the file is missing or has no splits with AUCs.
    """
    try:
        splits = json.loads(Path(path).read_text(encoding="utf-8"))["splits"]
        aucs = [(name, _auc(split["clean_auc"]), _auc(split["robust_auc"])) for name, split in splits.items()]
    except FileNotFoundError as error:
        raise UserError(f"--scores {path} does not exist") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--scores {path} is not a metrics.json written by evaluate.py") from error
    return "; ".join(f"{name} clean {clean} robust {robust}" for name, clean, robust in aucs)


def _auc(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _day(text: str) -> date | None:
    """Return the day of a date; None if it was made unreadable by hand, and then counts for no day."""
    try:
        return parse_date(text).date()
    except UserError:
        return None


def _clean(text: str) -> str:
    """Return a cell that every CSV reader reads back the same: UTF-8 without carriage returns."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
