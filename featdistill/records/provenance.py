"""Is an output finished, to be continued, or was it produced with different settings?

A command records, as JSON, what its output was made from. `claim` compares that record with what is
requested now, once and before any work.
"""

import json
import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

from featdistill.command_line import UserError

_MAX_SHOWN = 3


class Claim(Enum):
    """How much there is of an output."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"


def claim(
    output: str | Path,
    recorded: dict[str, Any] | None,
    requested: dict[str, Any],
    *,
    finished: bool = True,
    occupied: bool = False,
    ignore: Iterable[str] = (),
    remedy: str = "choose another --out, or remove it",
) -> Claim:
    """Decide what to do about an output.

    Args:
        output: its name, for the messages.
        recorded: what it was made from, or None without a record.
        requested: what it would be made from now.
        finished: whether the recorded output is complete.
        occupied: whether there is an output without a record.
        ignore: settings that do not change the result, as `key` or `outer.key`.
        remedy: ends the messages.

    Raises:
        UserError: it was produced with different settings (three are named), or not by this command.
    """
    if recorded is None:
        if occupied:
            raise UserError(f"{output} already exists and was not written by this command; {remedy}")
        return Claim.NEW
    changes = differences(recorded, requested, ignore)
    if changes:
        more = f"; and {len(changes) - _MAX_SHOWN} more" if len(changes) > _MAX_SHOWN else ""
        shown = "; ".join(changes[:_MAX_SHOWN]) + more
        raise UserError(f"{output} was produced with different settings: {shown}; {remedy}")
    return Claim.FINISHED if finished else Claim.UNFINISHED


def differences(recorded: dict[str, Any], requested: dict[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """Return one text per setting that differs, with both values; nested settings are called `outer.inner`.

    The `path` of a file does not count if its `sha256` is the same: the file may have moved.
    """
    old, new = _flatten(as_json(recorded)), _flatten(as_json(requested))
    ignored = set(ignore)
    for key in old:
        if key.endswith("sha256") and old[key] == new.get(key):
            ignored.add(key.removesuffix("sha256") + "path")
    keys = [key for key in {**old, **new} if key not in ignored and old.get(key) != new.get(key)]
    return [f"{key} was {_shown(old, key)}, is {_shown(new, key)}" for key in keys]


def as_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return the value as it is when read back from JSON: lists instead of tuples."""
    return json.loads(json.dumps(value))


def read_record(
    path: str | Path, remedy: str = "remove it and run the command again", **expected: Any
) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None without a file.

    Args:
        remedy: ends the messages.
        expected: values that the object must have, such as its `format`.

    Raises:
        UserError: the file does not hold a JSON object, or one with other values.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {error}; {remedy}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} must hold a JSON object; {remedy}")
    for key, value in expected.items():
        if (found := record.get(key)) != value:
            raise UserError(f"{path} has {key} {found!r}; this version reads {key} {value!r}; {remedy}")
    return record


def check_replaceable(
    path: str | Path, kind: str, remedy: str = "choose another --out, or remove it"
) -> None:
    """Raise a `UserError` if there is anything but a JSON file whose `format` is `kind`."""
    path = Path(path)
    is_ours = path.is_file() and (read_record(path, remedy) or {}).get("format") == kind
    claim(path, None, {}, occupied=path.exists() and not is_ours, remedy=remedy)


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Flatten nested objects, and lists of objects, to `outer.inner` -> JSON text."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(number): item for number, item in enumerate(value)}
    if not isinstance(value, dict) or (prefix and not value):
        return {prefix: json.dumps(value, ensure_ascii=False)}
    flat: dict[str, str] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _shown(flat: dict[str, str], key: str) -> str:
    """Return a value for a message; a SHA-256 is cut to its first twelve digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", flat.get(key, "absent"))
