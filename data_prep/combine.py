"""Several manifests to one, whole or only some of their rows, with each image once.

    python -m data_prep.combine data/train.csv data/ditfake.csv --out data/all.csv
    python -m data_prep.combine pool/manifest.csv --where split=train --out pool/train.csv
    python -m data_prep.combine a.csv b.csv --near-duplicates 4 --holdout 0.05 --balance label --out all.csv
    python -m data_prep.combine huge.csv --no-duplicates-check --out parts/ --rows-per-part 100000

Rows keep their order and all their columns. If manifests share image names, the names are prefixed with the
file name of their manifest. The steps, in this order:

| flag | effect |
|---|---|
| `--where` | keeps the rows with the given values; of one column, any of them counts |
| (always) | keeps images with equal bytes once; if they have two labels, that is an error |
| `--near-duplicates` | keeps images that look alike once, if label and generator are the same |
| `--weight` | adds a column `weight`, the rate at which a sampler draws a row; the rows stay the same |
| `--holdout` | writes a share, by whole groups, to FILE.holdout.csv |
| `--match` | pairs each AI image with the real one that shows most nearly the same, and drops the others |
| `--balance` | drops rows, on both sides of the hold-out, until all values of a column are equally frequent |

With `--near-duplicates` and `--holdout`, a training image that looks like a held-out one is dropped, whatever
its label.

`--match content` compares frozen features of the images reduced to 28 px, where no trace of a generator is
left, one to one, on each side of the hold-out by itself. A column `pair` numbers the pairs, and their groups
are merged. Where the classes show different things, every image has a match, but not a near one: keep the
nearest, with `--match-share 0.7`. With `--match-within fold`, folds stay whole.

The group of a dropped image and that of the image kept for it are merged, so that a hold-out does not
separate related images. Dropped images, and the ones kept for them, are listed in FILE.dropped.csv; images
that are missing or cannot be read in FILE.errors.csv, and the exit status is then 1.

With a folder as --out, the result is a manifest in parts: parquet files, for more rows than one process
should hold. Rows are then read and written part by part, and of the flags above only `--where` has an effect;
names must differ between manifests.
"""

import argparse
import logging
import math
from pathlib import Path

import pandas as pd

from data_prep.content import pairs
from data_prep.duplicates import keep_once as duplicates
from data_prep.duplicates.exact import equal_images
from data_prep.duplicates.near import MAX_DISTANCE_BITS, hash_images, near_pairs
from data_prep.writing.flags import add_flags
from data_prep.writing.manifests import check_out, remove_old_holdout, write_or_remove
from data_prep.writing.parts import check_names, write_parts
from data_prep.writing.sampling import hash_positions
from featdistill import command_line, text_tables
from featdistill.command_line import Parser, UserError, counted, nearest, within
from featdistill.records.manifest import manifest_chunks, read_manifest, split_holdout, write_manifest
from featdistill.records.parts import SUFFIX
from featdistill.storage import Folder

_log = logging.getLogger(__name__)
BALANCES = ("none", "label", "source", "generator")
_TABLE_ROWS = 40


def combine(paths: list[str], conditions: list[tuple[str, str]]) -> pd.DataFrame:
    """Return the rows of several manifests that have, as text, one of the values given for each column."""
    frames = [read_manifest(path) for path in paths]
    names = pd.concat([frame["name"] for frame in frames], ignore_index=True)
    if names.duplicated().any():
        for prefix, frame in zip(_prefixes(paths), frames, strict=True):
            frame["name"] = f"{prefix}/" + frame["name"]
    rows = pd.concat(frames, ignore_index=True)
    text = rows.columns.difference(["label", "is_distorted"])
    rows[text] = rows[text].fillna("")
    rows = _where(rows, conditions)
    if rows.empty:
        raise _nothing_left(paths, conditions)
    return rows


def _where(rows: pd.DataFrame, conditions: list[tuple[str, str]]) -> pd.DataFrame:
    """Return the rows that have, as text, one of the values given for each column."""
    wanted: dict[str, list[str]] = {}
    for column, value in conditions:
        wanted.setdefault(column, []).append(value)
    for column, accepted in wanted.items():
        if column not in rows:
            raise UserError(f"no manifest has a column {column}{nearest(column, rows.columns)}")
        rows = rows[rows[column].astype("string").fillna("").isin(accepted)]
    return rows.reset_index(drop=True)


def _nothing_left(paths: list[str], conditions: list[tuple[str, str]]) -> UserError:
    values = ", ".join(f"{column}={value}" for column, value in conditions)
    return UserError(f"no row of {', '.join(paths)} is left" + (f" with {values}" if values else ""))


def _to_parts(arguments: argparse.Namespace) -> int:
    """Write a manifest in parts."""
    paths, out = arguments.manifests, arguments.out
    per_image = ("near_duplicates", "holdout", "match", "weight")
    if any(getattr(arguments, name) for name in per_image) or arguments.balance != "none":
        raise UserError("parts take rows as they are; combine to a .csv first, and that to a folder")
    if not arguments.no_duplicates_check:
        raise UserError("parts are not searched for equal images; say so with --no-duplicates-check")
    before = [out] if arguments.append and Folder(out).names(SUFFIX) else []
    check_names([*before, *paths])
    chunks = (_where(rows, arguments.where) for path in paths for rows in manifest_chunks(path, 100_000))
    count = write_parts(chunks, out, arguments.rows_per_part, append=arguments.append)
    if not count:
        raise _nothing_left(paths, arguments.where)
    _log.info(f"{out}: {counted(count, 'row')}")
    return 0


def balance(rows: pd.DataFrame, by: str, seed: int) -> pd.DataFrame:
    """Drop rows until all values of the column `by` are as frequent as the rarest; the order stays.

    A hash of (seed, name) decides which rows stay. By `generator`, all real images stay.
    """
    if by == "none":
        return rows
    chosen = rows["label"].fillna(-1) == 1 if by == "generator" else pd.Series(True, index=rows.index)
    value = rows.loc[chosen, by].astype("string").fillna("")
    if by != "source" and (value == "").any():
        count, first = (value == "").sum(), rows["name"][value.index[value == ""][0]]
        raise UserError(f"--balance {by}: {count} rows have no {by}, {first} among them")
    if value.empty:
        return rows
    stays = ~chosen
    stays[value.index] = hash_positions(rows["name"][chosen], value, seed) < value.value_counts().min()
    return rows[stays].reset_index(drop=True)


def add_weights(rows: pd.DataFrame, weights: dict[str, float]) -> None:
    """Write the weights of sources to the column `weight`; other rows keep theirs, or get 1."""
    known = sorted(rows["source"].unique())
    for source in weights:
        command_line.one_of("source", source, known)
    previous = rows["weight"].where(rows["weight"] != "", "1") if "weight" in rows else "1"
    rows["weight"] = rows["source"].map({source: f"{value:g}" for source, value in weights.items()})
    rows["weight"] = rows["weight"].fillna(pd.Series(previous, index=rows.index))


def _condition(text: str) -> tuple[str, str]:
    column, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be COLUMN=VALUE, not {text}")
    return column, value


def _weight(text: str) -> tuple[str, float]:
    source, separator, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not separator or not 0 < weight < math.inf:
        raise argparse.ArgumentTypeError(f"must be SOURCE=W with a positive number W, not {text}")
    return source, weight


def table(training: pd.DataFrame, held: pd.DataFrame | None) -> str:
    """Return a table of the images by source and generator; rows beyond the 40 largest are summed up."""
    sides = [training] if held is None else [training, held]
    rows = pd.concat([side.assign(is_held=side is held) for side in sides])
    label = rows["label"].map({0: "real", 1: "AI"}).astype("object").fillna("unlabeled")
    keys = [rows["source"], rows["generator"]]
    counts = pd.crosstab(keys, label).reindex(columns=["real", "AI", "unlabeled"], fill_value=0)
    largest = counts.sum(axis=1).sort_values(ascending=False, kind="stable").index[:_TABLE_ROWS]
    if held is not None:
        counts["held out"] = rows["is_held"].groupby(keys).sum()
    lines = [(*key, *counts.loc[key]) for key in counts.index if key in largest]
    rest = counts.drop(index=largest)
    if len(rest):
        lines.append((f"({len(rest)} more)", "", *rest.sum()))
    lines.append(("all", "", *counts.sum()))
    header = ("source", "generator", *counts.columns)
    return text_tables.table(header, [[str(cell) for cell in line] for line in lines])


def build_parser() -> Parser:
    parser = Parser(prog="python -m data_prep.combine", description="Combine manifests, or some rows.")
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST")
    help_text = "the manifest; or a folder, for a manifest in parts"
    parser.add_argument("--out", required=True, metavar="FILE.csv or FOLDER", help=help_text)
    parts = parser.add_argument_group("manifest in parts")
    parts.add_argument(
        "--rows-per-part", type=within(1), default=100_000, metavar="N", help="rows of each part"
    )
    parts.add_argument("--append", action="store_true", help="add to the parts that are in the folder")
    parser.add_argument(
        "--where",
        nargs="+",
        type=_condition,
        default=[],
        metavar="COLUMN=VALUE",
        help="keep only rows with these values, as in split=train label=1; of one column, any of them counts",
    )
    help_text = "do not look for images with equal bytes: no image is read"
    parser.add_argument("--no-duplicates-check", action="store_true", help=help_text)
    parser.add_argument(
        "--near-duplicates",
        type=within(0, MAX_DISTANCE_BITS),
        metavar="BITS",
        help="decode all images, and keep those once whose 64-bit hashes differ in at most BITS bits",
    )
    parser.add_argument("--balance", choices=BALANCES, default="none", help="make values equally frequent")
    parser.add_argument(
        "--weight",
        nargs="+",
        type=_weight,
        default=[],
        metavar="SOURCE=W",
        help="add a column weight: how often to draw an image of a source, compared with weight 1",
    )
    add_flags(parser, "holdout", "seed", "workers")
    pairs.add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if not arguments.out.lower().endswith(".csv"):
        return _to_parts(arguments)
    arguments.out = Path(arguments.out)
    weights = dict(arguments.weight)
    if len(weights) < len(arguments.weight):
        raise UserError("--weight names a source twice")
    outputs = {path.resolve() for path in (arguments.out, arguments.out.with_suffix(".holdout.csv"))}
    for manifest in arguments.manifests:
        if Path(manifest).resolve() in outputs:
            raise UserError(f"--out {arguments.out} would replace the input {manifest}; choose another --out")
    check_out(arguments.out)
    pairs.check(arguments)
    bits = arguments.near_duplicates
    rows = combine(arguments.manifests, arguments.where)

    dropped: list[duplicates.Dropped] = []
    faults: list[tuple[str, str]] = []
    if not arguments.no_duplicates_check:
        sets, broken = equal_images(rows["image"].tolist())
        rows = duplicates.drop_equal(rows, sets, dropped)
        rows = duplicates.drop_broken(rows, broken, faults)
    rows = rows.reset_index(drop=True)
    hashes = None
    if bits is not None:
        hashes, broken = hash_images(rows["image"].tolist(), arguments.workers)
        hashes = pd.Series(hashes, index=rows["name"], dtype="object")
        rows = duplicates.drop_near(rows, near_pairs(hashes, bits), dropped)
        rows = duplicates.drop_broken(rows, broken, faults).reset_index(drop=True)
    if rows.empty:
        raise UserError(f"no image of {', '.join(arguments.manifests)} could be read; the first: {faults[0]}")
    if weights:
        add_weights(rows, weights)
    content = pairs.Content(rows, arguments) if arguments.match else None
    held = None
    if arguments.holdout is not None:
        rows, held = split_holdout(rows, arguments.holdout, arguments.seed)
        if hashes is not None:
            rows = duplicates.drop_across(rows, held, hashes, bits, dropped)
        held = balance(held, arguments.balance, arguments.seed)
        if content:
            held = pairs.matched(held, content, arguments, dropped, faults)
    if content:
        rows = pairs.matched(rows, content, arguments, dropped, faults)
    rows = balance(rows, arguments.balance, arguments.seed)
    _save(rows, held, arguments.out, dropped, faults)
    return 1 if faults else 0


def _prefixes(paths: list[str]) -> list[str]:
    """Return names for the manifests: the file's name, with as many folders as make them different."""
    parts = [Path(path).absolute().with_suffix("").parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        prefixes = ["/".join(part[-depth:]).lstrip("/") for part in parts]
        if len(set(prefixes)) == len(prefixes):
            return prefixes
    repeated = next(path for row, path in enumerate(paths) if parts[row] in parts[:row])
    raise UserError(f"{repeated} is given twice")


def _save(
    rows: pd.DataFrame,
    held: pd.DataFrame | None,
    out: Path,
    dropped: list[duplicates.Dropped],
    faults: list[tuple[str, str]],
) -> None:
    """Write the manifests and the lists of dropped and broken images, and show the result."""
    held_path = out.with_suffix(".holdout.csv")
    dropped_path, errors_path = out.with_suffix(".dropped.csv"), out.with_suffix(".errors.csv")
    remove_old_holdout(held_path, out, is_replaced=held is not None)
    frames = {out: rows} | ({} if held is None else {held_path: held})
    for path, frame in frames.items():
        write_manifest(frame, path)
    write_or_remove(dropped_path, ("name", "reason", "kept"), dropped)
    write_or_remove(errors_path, ("name", "reason"), faults)
    _log.info(table(rows, held))
    reasons = pd.Series([reason for _, reason, _ in dropped], dtype="object").value_counts()
    for reason, count in reasons.items():
        _log.info(f"{counted(count, 'image')} dropped ({reason}); see {dropped_path}")
    if faults:
        _log.info(f"left out, cannot be read: {counted(len(faults), 'image')}; see {errors_path}")
    for path, frame in frames.items():
        counts = frame["label"].value_counts()
        _log.info(f"{path}: {counted(len(frame), 'row')}, {counts.get(0, 0)} real, {counts.get(1, 0)} AI")


if __name__ == "__main__":
    command_line.run(main)
