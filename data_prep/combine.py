"""Several manifests to one, whole or only some of their rows, each image once.

    python -m data_prep.combine data/train.csv data/ditfake.csv --out data/all.csv
    python -m data_prep.combine pool/manifest.csv --where split=train --out pool/train.csv
    python -m data_prep.combine a.csv b.csv --near-duplicates 4 --holdout 0.05 --balance label --out all.csv

Rows keep their order and all their columns. Where manifests share names of images, each manifest's names get
the name of its file in front. What is done, in this order:

| flag | does |
|---|---|
| `--where` | keeps the rows that have the values asked for |
| (always) | keeps images whose bytes are equal once; with two labels they are an error |
| `--near-duplicates` | keeps images that look alike once, where label and generator are the same |
| `--weight` | adds a column `weight`, the rate at which a sampler is to draw a row; rows stay as they are |
| `--holdout` | writes a share, by whole groups, to FILE.holdout.csv |
| `--balance` | leaves out rows, on either side of the hold-out, until a column's values are as frequent |

With `--near-duplicates` and `--holdout`, a training image that looks like a held-out one is left out,
whatever its label.

The groups of an image that is left out and of the one kept for it become one group, so that a hold-out does
not come between their relatives. What was left out, and for which image, is listed in FILE.dropped.csv;
images that are missing or cannot be read in FILE.errors.csv, and the status is then 1.
"""

import math
import os
from pathlib import Path

import pandas as pd

from data_prep.duplicates import keep_once as kept_once
from data_prep.duplicates import near as near_duplicates
from data_prep.duplicates.exact import equal_images
from featdistill import atomic, command_line
from featdistill.command_line import Parser, UserError, nearest
from featdistill.records.manifest import read_manifest, split_holdout, write_manifest
from featdistill.seeds import hash_ranks

BALANCES = ("none", "label", "source", "generator")
_TABLE_ROWS = 40


def combine(paths: list[str], conditions: list[tuple[str, str]]) -> pd.DataFrame:
    """Return the rows of several manifests that meet all conditions.

    Args:
        paths: manifests.
        conditions: (column, value) pairs; a row must have the value, as text, in the column.

    Raises:
        UserError: a column is in none of the manifests, no row is left, or names repeat beyond repair.
    """
    frames = [read_manifest(path) for path in paths]
    names = pd.concat([frame["name"] for frame in frames], ignore_index=True)
    if names.duplicated().any():
        for front, frame in zip(_fronts(paths), frames, strict=True):
            frame["name"] = f"{front}/" + frame["name"]
    rows = pd.concat(frames, ignore_index=True)
    further = rows.columns.difference(["label", "is_distorted"])
    rows[further] = rows[further].fillna("")
    for column, value in conditions:
        if column not in rows:
            raise UserError(f"no manifest has a column {column}{nearest(column, rows.columns)}")
        rows = rows[rows[column].astype("string").fillna("") == value]
    if rows.empty:
        wanted = ", ".join(f"{column}={value}" for column, value in conditions)
        raise UserError(f"no row of {', '.join(paths)} is left" + (f" with {wanted}" if wanted else ""))
    return rows.reset_index(drop=True)


def balance(rows: pd.DataFrame, by: str, seed: int) -> pd.DataFrame:
    """Leave out rows until all values of a column are as frequent as the rarest; the order stays.

    Which rows stay is decided by a hash of (seed, name), not by their order. By `generator`, real images stay
    as they are.

    Args:
        by: one of `BALANCES`.

    Raises:
        UserError: by `label`, and a row has none; by `generator`, and an AI-generated image has none.
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
    rank = pd.Series(hash_ranks(rows.loc[chosen, "name"], seed), index=value.index)
    place = rank.groupby(value).rank(method="first")
    stays = ~chosen
    stays[value.index] = place <= value.value_counts().min()
    return rows[stays].reset_index(drop=True)


def add_weights(rows: pd.DataFrame, weights: dict[str, float]) -> None:
    """Write the weights of sources to the column `weight`; other rows keep theirs, or get 1.

    Raises:
        UserError: a source has no rows.
    """
    known = sorted(rows["source"].unique())
    for source in weights:
        command_line.one_of("source", source, known)
    former = rows["weight"].where(rows["weight"] != "", "1") if "weight" in rows else "1"
    rows["weight"] = rows["source"].map({source: f"{value:g}" for source, value in weights.items()})
    rows["weight"] = rows["weight"].fillna(pd.Series(former, index=rows.index))


def parse_weights(texts: list[str]) -> dict[str, float]:
    """Return the weight of each source from texts `SOURCE=W`.

    Raises:
        UserError: a text is no such pair, W is no positive number, or a source appears twice.
    """
    weights: dict[str, float] = {}
    for text in texts:
        source, separator, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not separator or not 0 < weight < math.inf:
            raise UserError(f"--weight takes SOURCE=W with a positive number W, not {text}")
        if source in weights:
            raise UserError(f"--weight gives {source} twice")
        weights[source] = weight
    return weights


def table(training: pd.DataFrame, held: pd.DataFrame | None) -> str:
    """Return a table of the images by source and generator, as lines of text.

    Rows beyond the 40 largest are summed up in one line.
    """
    sides = [training] if held is None else [training, held]
    marked = pd.concat([side.assign(side=place) for place, side in enumerate(sides)])
    label = marked["label"].map({0: "real", 1: "AI"}).astype("object").fillna("unlabelled")
    keys = [marked["source"], marked["generator"]]
    counts = pd.crosstab(keys, label).reindex(columns=["real", "AI", "unlabelled"], fill_value=0)
    counts["held out"] = (marked["side"] == 1).groupby(keys).sum()
    total = counts.sum()
    kept = counts.assign(size=counts[["real", "AI", "unlabelled"]].sum(axis=1))
    kept = kept.sort_values("size", ascending=False, kind="stable").head(_TABLE_ROWS).index
    lines = [(*map(str, key), *counts.loc[key]) for key in counts.index if key in kept]
    rest = counts.drop(index=kept)
    if len(rest):
        lines.append((f"({len(rest)} more)", "", *rest.sum()))
    lines.append(("all", "", *total))
    if held is None:
        lines = [line[:-1] for line in lines]
    header = ("source", "generator", *counts.columns)[: len(lines[0])]
    cells = [[str(cell) for cell in line] for line in (header, *lines)]
    widths = [min(40, max(len(line[column]) for line in cells)) for column in range(len(header))]
    text = []
    for line in cells:
        left = [cell[:width].ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        text.append("  ".join(left + right))
    return "\n".join(text)


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m data_prep.combine", description="Several manifests, or some rows, to one."
    )
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST")
    parser.add_argument("--out", required=True, metavar="FILE.csv", help="the manifest to write")
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="COLUMN=VALUE",
        help="keep only rows with these values, as in split=train label=1",
    )
    parser.add_argument(
        "--no-duplicates-check",
        action="store_true",
        help="do not look for images whose bytes are equal: no image is looked at",
    )
    parser.add_argument(
        "--near-duplicates",
        type=int,
        metavar="BITS",
        help="decode all images and keep those once whose 64-bit hashes differ in at most so many bits",
    )
    parser.add_argument("--holdout", type=float, help="share of the images to write to FILE.holdout.csv")
    parser.add_argument("--balance", choices=BALANCES, default="none", help="leave out rows of what is more")
    parser.add_argument(
        "--weight",
        nargs="+",
        default=[],
        metavar="SOURCE=W",
        help="add a column weight: how often to draw an image of a source beside one of weight 1",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed holds and leaves out other images")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode images")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    out = Path(arguments.out)
    if out.suffix != ".csv":
        raise UserError(f"--out {out} must be the name of a .csv file")
    conditions = []
    for text in arguments.where:
        column, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"--where takes COLUMN=VALUE, not {text}")
        conditions.append((column, value))
    weights = parse_weights(arguments.weight)
    bits = arguments.near_duplicates
    if bits is not None:
        near_duplicates.check_distance(bits)
    rows = combine(arguments.manifests, conditions)

    dropped: list[kept_once.Dropped] = []
    faults: list[tuple[str, str]] = []
    if not arguments.no_duplicates_check:
        sets, broken = equal_images(rows["image"].tolist())
        rows = kept_once.drop_equal(rows, sets, dropped)
        rows = kept_once.drop_broken(rows, broken, faults)
    rows = rows.reset_index(drop=True)
    hashes = None
    if bits is not None:
        hashes, broken = near_duplicates.hash_images(rows["image"].tolist(), arguments.workers)
        hashes = pd.Series(hashes, index=rows["name"], dtype="object")
        rows = kept_once.drop_near(rows, near_duplicates.near_pairs(hashes, bits), dropped)
        rows = kept_once.drop_broken(rows, broken, faults).reset_index(drop=True)
    if rows.empty:
        raise UserError(f"no image of {', '.join(arguments.manifests)} could be read; the first: {faults[0]}")
    if weights:
        add_weights(rows, weights)
    held = None
    if arguments.holdout is not None:
        rows, held = split_holdout(rows, arguments.holdout, arguments.seed)
        if hashes is not None:
            rows = kept_once.drop_across(rows, held, hashes, bits, dropped)
        held = balance(held, arguments.balance, arguments.seed)
    rows = balance(rows, arguments.balance, arguments.seed)
    return _save(rows, held, out, dropped, faults)


def _fronts(paths: list[str]) -> list[str]:
    """Return names of the manifests: that of the file, with as many folders before it as tell them apart."""
    parts = [Path(path).absolute().with_suffix("").parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        fronts = ["/".join(part[-depth:]).lstrip("/") for part in parts]
        if len(set(fronts)) == len(fronts):
            return fronts
    again = next(path for place, path in enumerate(paths) if parts[place] in parts[:place])
    raise UserError(f"{again} is given twice")


def _save(
    rows: pd.DataFrame,
    held: pd.DataFrame | None,
    out: Path,
    dropped: list[kept_once.Dropped],
    faults: list[tuple[str, str]],
) -> int:
    """Write the manifests and what was left out, print the result, and return the exit status."""
    held_path = out.with_suffix(".holdout.csv")
    if held is None and held_path.exists():
        print(f"note: {held_path}, of an earlier run, is removed: its rows may be in {out}")
    # Beside a new manifest, an earlier run's hold-out would be rows that are trained on.
    held_path.unlink(missing_ok=True)
    write_manifest(rows, out)
    if held is not None:
        write_manifest(held, held_path)
    lists = [
        (".dropped.csv", ("name", "reason", "kept"), dropped),
        (".errors.csv", ("name", "reason"), faults),
    ]
    for suffix, header, lines in lists:
        path = out.with_suffix(suffix)
        if lines:
            atomic.write_text(path, atomic.csv_text(header, lines))
        else:
            path.unlink(missing_ok=True)
    print(table(rows, held))
    reasons = pd.Series([reason for _, reason, _ in dropped], dtype="object").value_counts()
    for reason, count in reasons.items():
        print(f"{count} images left out ({reason}); see {out.with_suffix('.dropped.csv')}")
    if faults:
        print(f"{len(faults)} images cannot be read and are left out; see {out.with_suffix('.errors.csv')}")
    for path, frame in ((out, rows), (held_path, held)):
        if frame is not None:
            counts = frame["label"].value_counts()
            print(f"{path}: {len(frame)} rows, {counts.get(0, 0)} real, {counts.get(1, 0)} AI")
    return 1 if faults else 0


if __name__ == "__main__":
    command_line.run(main)
