"""Manifests to a manifest in parts, without holding all rows at once; see `featdistill.records.parts`."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from featdistill.command_line import UserError
from featdistill.records.manifest import join_rows, manifest_chunks, relative_to
from featdistill.records.parts import (
    RECORD,
    SUFFIX,
    Parts,
    has_parts,
    name_hashes,
    part_name,
    repeated,
    table_bytes,
)
from featdistill.storage import Folder

_OURS = re.compile(rf"part-\d+{re.escape(SUFFIX)}")
_LABELS = ("label", "is_distorted")


def write_parts(chunks: Iterable[pd.DataFrame], out: str, rows_per_part: int, *, append: bool) -> int:
    """Write rows as parts of a folder, in their order; return their number.

    Parts that exist with the same content stay, so that the same command continues a killed one.

    Args:
        append: keep the parts that are there, and number the new ones after them.

    Raises:
        UserError: the folder has other parts.
    """
    folder, total = Folder(out), 0
    existing = set(folder.names(SUFFIX))
    if strange := [name for name in sorted(existing) if not _OURS.fullmatch(name)]:
        raise UserError(f"{out} holds {strange[0]}, which is not a part written here; choose another --out")
    if RECORD in folder.names(RECORD):
        raise UserError(f"{out} holds scores; choose another --out")
    first = _next_number(existing) if append else 0
    for number, rows in enumerate(_resized(chunks, rows_per_part), start=first):
        data, name = _bytes(relative_to(out, rows)), part_name(number)
        if name in existing and folder.read(name) != data:
            raise UserError(
                f"{out} already has a {name} with other rows; choose another --out, or use --append"
            )
        existing.discard(name)
        folder.create(name, data)
        total += len(rows)
    if existing and not append:
        raise UserError(f"{out} also has {sorted(existing)[0]}, from before; remove it, or use --append")
    return total


def check_names(manifests: list[str]) -> None:
    """Raise a `UserError` if a name appears more than once in manifests."""
    names = (names for path in manifests for names in _names(path))
    if hashes := repeated(names):
        for path in manifests:
            for found in _names(path):
                if (hit := np.isin(name_hashes(found), [*hashes])).any():
                    raise UserError(
                        f"name {found[hit].iloc[0]} of {path} appears more than once; after an interrupted "
                        "--append, first remove the parts that it added"
                    )


def _names(path: str) -> Iterator[pd.Series]:
    if has_parts(path):
        yield from (frame["name"] for frame in Parts(path).columns(["name"]))
    else:
        yield from (chunk["name"] for chunk in manifest_chunks(path, 100_000))


def _next_number(names: Iterable[str]) -> int:
    numbers = [Path(name).stem.rpartition("-")[2] for name in names]
    return max([int(number) + 1 for number in numbers if number.isdigit()], default=0)


def _resized(chunks: Iterable[pd.DataFrame], rows: int) -> Iterator[pd.DataFrame]:
    """Yield the rows of all chunks, this many at a time."""
    waiting: list[pd.DataFrame] = []
    for chunk in chunks:
        waiting.append(chunk)
        while sum(map(len, waiting)) >= rows:
            joined = join_rows(waiting)
            yield joined[:rows].reset_index(drop=True)
            waiting = [joined[rows:].reset_index(drop=True)]
    if sum(map(len, waiting)):
        yield join_rows(waiting).reset_index(drop=True)


def _bytes(rows: pd.DataFrame) -> bytes:
    types = {name: pa.int8() if name in _LABELS else pa.string() for name in rows}
    return table_bytes({name: pa.array(rows[name], types[name], from_pandas=True) for name in rows})
