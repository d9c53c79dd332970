"""The manifest of a data set: a CSV with one row per image, wherever the image comes from.

Columns (UTF-8, header first; further columns survive a round trip):

| column | holds |
|---|---|
| `image` | path relative to the manifest's folder, absolute path, `s3://..` or `archive.zip::member.jpg` |
| `name` | what a submission calls the image; unique within a manifest |
| `label` | 0 real, 1 AI-generated, empty if unknown |
| `source`, `generator` | where the image comes from; what generated it (empty for real images) |
| `group` | images that belong together: never on both sides of a hold-out |
| `is_distorted` | 0, 1, or empty if unknown |
| `distortions` | JSON list of [name, scale] in the order of application |
| `licence` | as far as known |

A folder of parquet files with these columns is a manifest, too; see `featdistill.records.parts`.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from featdistill import atomic, remote_files
from featdistill.command_line import UserError
from featdistill.images.listing import (
    ARCHIVE_SEPARATOR,
    UNPRINTABLE,
    absolute,
    printable,
    split_location,
)
from featdistill.records.parts import Parts, Stamp, has_parts
from featdistill.seeds import hash_ranks

COLUMNS = ("image", "name", "label", "source", "generator", "group", "is_distorted", "distortions", "licence")
# The columns that decide how an image is trained on or scored.
DECISIVE_COLUMNS = ("name", "label", "source", "group", "is_distorted", "weight")
# Column of a probe's labels: the view of a bank that they are of; the images are the undistorted ones.
BANK_VIEW = "bank_view"
_MAX_STATS = 10_000


def make_manifest(columns: dict[str, list]) -> pd.DataFrame:
    """Build a manifest from columns; `label` and `is_distorted` may hold 0, 1 or None.

    A column that is missing of `COLUMNS` is empty, or `[]` for `distortions`. Control characters and bytes
    that are not UTF-8 become `\\xNN`, by which an image is found as well; see `listing.printable`.
    """
    for name, values in columns.items():
        if UNPRINTABLE.search("".join(cell for cell in values if isinstance(cell, str))):
            columns = columns | {
                name: [printable(cell) if isinstance(cell, str) else cell for cell in values]
            }
    frame = pd.DataFrame({name: pd.Series(values, dtype="object") for name, values in columns.items()})
    frame = _typed(frame, "the rows")
    return frame[[*COLUMNS, *(name for name in frame if name not in COLUMNS)]]


def read_manifest(path: str | Path) -> pd.DataFrame:
    """Read and check a manifest.

    Args:
        path: of the file, or its address; see `featdistill.remote_files`.

    Returns:
        A frame with all of `COLUMNS`; `label` and `is_distorted` are `Int8` with missing values, all else is
        text. `image` is made absolute; `frame.attrs["path"]` is the manifest's path.

    Raises:
        UserError: the file is missing or not a manifest, a label is unknown, or a name appears twice.
    """
    frames = list(manifest_chunks(path))
    frame = join_rows(frames)
    if len(frames) > 1 and (again := frame["name"].duplicated()).any():
        name = frame["name"][again].iloc[0]
        raise UserError(f"{path}: name {name} appears in two parts ({again.sum()} repeated rows)")
    frame.attrs["path"] = str(path)
    return frame


def manifest_chunks(path: str | Path, rows: int | None = None) -> Iterator[pd.DataFrame]:
    """Yield the rows of a manifest like `read_manifest`: a folder part by part, a CSV `rows` at a time.

    That a name appears once is checked among the rows yielded at a time only.
    """
    if has_parts(path):
        parts = Parts(path)
        yield from (read_part(parts, name)[0] for name in parts.names)
        return
    source = path = remote_files.located(path)
    try:
        if isinstance(path, str):
            source = io.BytesIO(remote_files.read(path))
        elif not path.is_file():
            raise FileNotFoundError
    except FileNotFoundError as error:
        raise UserError(f"manifest {path} does not exist") from error
    try:
        frames = pd.read_csv(source, dtype=str, keep_default_na=False, encoding="utf-8-sig", chunksize=rows)
        for frame in [frames] if rows is None else frames:
            if not isinstance(frame.index, pd.RangeIndex):
                raise UserError(f"{path} is not a manifest: its rows have more cells than its header")
            if missing := [name for name in ("image", "name") if name not in frame]:
                raise UserError(f"{path} is not a manifest: column {', '.join(missing)} is missing")
            yield checked(frame.reset_index(drop=True), str(path), os.path.dirname(path))
    except ValueError as error:
        raise UserError(f"{path} is not a readable CSV: {error}") from error


def read_part(parts: Parts, name: str) -> tuple[pd.DataFrame, Stamp]:
    """Return a part of a manifest like `read_manifest`, and the hashes of its file."""
    frame, stamp = parts.read(name)
    return checked(frame, parts.where(name), parts.folder.address), stamp


def write_manifest(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a manifest atomically; images below its folder get relative paths, so that both can be moved."""
    path = Path(path)
    frame = relative_to(path.parent, _typed(frame.copy(), str(path)))
    with atomic.replace_file(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")


def relative_to(folder: str | Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Return rows in which the paths of images below a folder are relative to it."""
    inside = os.path.join(os.path.abspath(folder), "")
    return frame.assign(image=[image.removeprefix(inside) for image in frame["image"]])


def read_manifests(paths: list[str | Path]) -> pd.DataFrame:
    """Read several manifests as one set of rows; names may repeat between manifests, not within one."""
    return join_rows([read_manifest(path) for path in paths])


def join_rows(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all frames; a further column that one of them lacks is empty there."""
    if len(frames) == 1:
        return frames[0]
    rows = pd.concat(frames, ignore_index=True)
    further = rows.columns.difference(COLUMNS)
    rows[further] = rows[further].fillna("")
    return rows


def parse_distortions(text: str) -> list[tuple[str, float]]:
    """Return the (name, scale) pairs of a `distortions` cell."""
    return [(name, scale) for name, scale in json.loads(text or "[]")]


def fingerprint(rows: pd.DataFrame, columns: Sequence[str] = DECISIVE_COLUMNS) -> str:
    """Return a hash of which images these are: their sizes, and columns of their rows.

    Where the images are does not count, so that a folder may move. Of large sets, only the sizes of files
    spread evenly over it are read, which takes seconds at most; and none of those at addresses.

    Args:
        columns: those that count, where the rows have them; by default names, labels, and what else training
            reads.
    """
    table = rows[[name for name in columns if name in rows]].to_csv(index=False)
    hashed = hashlib.sha256(table.encode(errors="surrogatepass"))
    sizes: dict[str, int] = {}
    for location in rows["image"].iloc[:: -(-len(rows) // _MAX_STATS) or 1]:
        path, member = split_location(location)
        if path not in sizes:
            sizes[path] = os.stat(path).st_size if os.path.isfile(path) else -1
        hashed.update(f"{member or ''}:{sizes[path]}\n".encode(errors="surrogatepass"))
    return hashed.hexdigest()


def split_holdout(frame: pd.DataFrame, share: float, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split rows into (training, hold-out) by whole groups, stratified by label.

    Groups are picked in the order of a hash of (seed, group), which the order of the rows does not change; a
    group larger than what is still missing is skipped. A row without a group is a group of its own. The
    stratum of a group is the set of its labels.

    Args:
        share: of the rows to hold out, in (0, 1).

    Raises:
        UserError: `share` is out of range, or one side would be empty.
    """
    if not 0 < share < 1:
        raise UserError(f"the hold-out share must be between 0 and 1, not {share}")
    group = frame["group"].where(frame["group"] != "", "name:" + frame["name"])
    # One bit per label, so that the sum over a group's distinct labels tells which ones it has.
    bit = 2 ** frame["label"].fillna(2).astype("int64")
    table = pd.DataFrame({"rows": group.value_counts(sort=False)})
    distinct = pd.DataFrame({"group": group, "bit": bit}).drop_duplicates()
    table["stratum"] = distinct.groupby("group")["bit"].sum()
    table["rank"] = hash_ranks(table.index, seed)
    table = table.sort_values("rank", kind="stable")
    missing = (share * table.groupby("stratum")["rows"].sum()).to_dict()
    held_groups = []
    for name, rows, stratum in table[["rows", "stratum"]].itertuples():
        if rows / 2 <= missing[stratum]:
            missing[stratum] -= rows
            held_groups.append(name)
    held = group.isin(held_groups)
    if held.all() or not held.any():
        raise UserError(
            f"a hold-out of {share} leaves one side empty: {len(frame)} rows in {len(table)} groups"
        )
    return frame[~held].reset_index(drop=True), frame[held].reset_index(drop=True)


def checked(frame: pd.DataFrame, where: str, folder: str | Path) -> pd.DataFrame:
    """Check the cells of a manifest in a folder, set their types, and make the images' paths absolute."""
    frame, folder = _typed(frame, where), os.fspath(folder)
    folder = folder if remote_files.is_remote(folder) else os.path.abspath(folder)
    frame["image"] = [_absolute(image, folder) for image in frame["image"]]
    frame.attrs["path"] = where
    return frame


def _absolute(image: str, folder: str) -> str:
    if remote_files.is_remote(image):
        return image
    path, member = split_location(os.path.join(folder, image))
    if remote_files.is_remote(path):
        path = remote_files.join(folder, path.removeprefix(f"{folder}/"))
    return absolute(path) + ("" if member is None else ARCHIVE_SEPARATOR + member)


def _typed(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """Add missing columns, set the types of all, and check labels and names."""
    for name in COLUMNS:
        if name not in frame:
            frame[name] = "[]" if name == "distortions" else ""
    for column in ("label", "is_distorted"):
        text = frame[column].astype("object")
        text = text.where(~text.isna(), "").astype(str).str.strip().str.removesuffix(".0")
        bad = ~text.isin(["0", "1", ""])
        if bad.any():
            row = frame[bad].iloc[0]
            raise UserError(
                f"{where}: {column} of {row['name']} is {str(row[column])!r}; it must be 0, 1 or empty"
            )
        frame[column] = pd.to_numeric(text.where(text != ""), errors="raise").astype("Int8")
    for column in frame.columns.difference(["label", "is_distorted"]):
        frame[column] = frame[column].astype("object").where(frame[column].notna(), "").astype(str)
    repeated = frame["name"][frame["name"].duplicated()]
    if len(repeated):
        raise UserError(
            f"{where}: name {repeated.iloc[0]} appears more than once ({len(repeated)} repeated rows)"
        )
    return frame
