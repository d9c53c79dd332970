"""How far the scores of a manifest in parts are, and one predictions file of all of them."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from featdistill.command_line import UserError, counted
from featdistill.inference.leases import Leases
from featdistill.inference.parts import LEASE_S, LEASES, VERDICTS, metadata, record_of
from featdistill.records.parts import RECORD, SUFFIX, Parts, name_hashes, repeated
from featdistill.records.predictions import manifest_entry, read_sidecar, save_rows
from featdistill.records.provenance import claim
from featdistill.storage import Folder, is_remote
from featdistill.text_tables import table

_MAX_SHOWN = 20
_REMEDY = "name another file"


def status(out: str) -> str:
    """Return how far the scores in a folder are, as a table; nothing is changed.

    Raises:
        UserError: the folder holds no scores in parts.
    """
    folder, parts = Folder(out), Parts(_record(out)["manifest"])
    leases = Leases(f"{out}/{LEASES}", LEASE_S)
    held, done = leases.held(), set(folder.names(SUFFIX))
    groups = {"finished": [], "being scored": [], "waiting": []}
    for name in parts.names:
        groups["finished" if name in done else "being scored" if name in held else "waiting"].append(name)
    lines = [(title, str(len(names)), str(sum(map(parts.count, names)))) for title, names in groups.items()]
    lines.append(("all", str(len(parts.names)), str(sum(int(line[2]) for line in lines))))
    broken = sum(metadata(folder, name)["errors"] for name in groups["finished"])
    working = [f"{name}: {leases.holder(held[name])}" for name in groups["being scored"][:_MAX_SHOWN]]
    text = [table(("", "parts", "images"), lines), f"{counted(broken, 'image')} could not be read", *working]
    return "\n".join(text)


def merge(out: str, target: str) -> str:
    """Write one predictions file of all parts in a folder, part by part; return a line about it.

    Raises:
        UserError: a part is not finished or has changed since, or a name appears twice.
    """
    if is_remote(target):
        raise UserError(f"--merge writes a file on this machine, not {target}")
    folder, record = Folder(out), _record(out)
    manifest, made_from = record["manifest"], record["made_from"]
    parts, again = Parts(manifest), f"run predict.py --manifest {manifest} --out {out}"
    if missing := sorted(set(parts.names) - set(folder.names(SUFFIX))):
        raise UserError(
            f"{counted(len(missing), 'part')} not scored yet, such as {missing[0]}; {again} first"
        )
    for name in parts.names:
        if metadata(folder, name)["manifest_sha256"] != hashlib.sha256(parts.folder.read(name)).hexdigest():
            raise UserError(f"{parts.where(name)} has changed since; remove {out}/{name} and {again} again")
    if hashes := repeated(frame["name"] for frame in parts.columns(["name"])):
        raise UserError(f"{manifest}: name {_example(parts, hashes)} appears more than once")
    frames = (_read(folder, name) for name in parts.names)
    header = ["name", "score", *made_from["experts"]]
    errors: list[tuple[str, str]] = []
    sidecar = {key: value for key, value in made_from.items() if key != VERDICTS}
    sidecar["manifest"] = manifest_entry(manifest, target)
    exists = Path(target).exists()
    claim(target, read_sidecar(target) if exists else None, sidecar, occupied=exists, remedy=_REMEDY)
    # One reading for the errors, which are few, and one for the rows.
    for name in parts.names:
        frame = _read(folder, name, ["name", "error"])
        errors += frame[frame["error"].notna()].itertuples(index=False, name=None)
    save_rows(target, header, _rows(frames, header), sidecar, errors)
    return f"{target}: {counted(sum(map(parts.count, parts.names)) - len(errors), 'score')}"


def _rows(frames: Iterable[pd.DataFrame], header: list[str]) -> Iterator[list]:
    for frame in frames:
        yield from frame.loc[frame["error"].isna(), header].values.tolist()


def _read(folder: Folder, name: str, columns: list[str] | None = None) -> pd.DataFrame:
    try:
        with folder.open(name) as file:
            return pq.read_table(file, columns=columns).to_pandas()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder.address}/{name} is damaged; remove it and score again") from error


def _example(parts: Parts, hashes: set[int]) -> str:
    """Return a name that has one of these hashes."""
    found = (
        frame["name"][np.isin(name_hashes(frame["name"]), [*hashes])] for frame in parts.columns(["name"])
    )
    return next(names.iloc[0] for names in found if len(names))


def _record(out: str) -> dict[str, Any]:
    record = record_of(Folder(out))
    if record is None:
        raise UserError(f"{out} holds no {RECORD}: it is not a folder of scores in parts")
    return record
