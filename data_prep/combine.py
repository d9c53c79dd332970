"""Several manifests to one, whole or only some of their rows.

    python -m data_prep.combine data/train.csv data/ditfake.csv --out data/all.csv
    python -m data_prep.combine pool/manifest.csv --where split=train --out pool/train.csv

Rows keep their order and all their columns. Where manifests share names of images, each manifest's names get
the name of its file in front.
"""

from pathlib import Path

import pandas as pd

from featdistill import command_line
from featdistill.command_line import Parser, UserError, nearest
from featdistill.manifest import read_manifest, write_manifest


def combine(paths: list[str], conditions: list[tuple[str, str]]) -> pd.DataFrame:
    """Return the rows of several manifests that meet all conditions.

    Args:
        paths: manifests.
        conditions: (column, value) pairs; a row must have the value, as text, in the column.

    Raises:
        UserError: a column is in none of the manifests, or no row is left.
    """
    frames = [read_manifest(path) for path in paths]
    names = pd.concat([frame["name"] for frame in frames], ignore_index=True)
    if names.duplicated().any():
        for path, frame in zip(paths, frames, strict=True):
            frame["name"] = f"{Path(path).stem}/" + frame["name"]
    rows = pd.concat(frames, ignore_index=True)
    for column, value in conditions:
        if column not in rows:
            raise UserError(f"no manifest has a column {column}{nearest(column, rows.columns)}")
        rows = rows[rows[column].astype("string").fillna("") == value]
    if rows.empty:
        wanted = ", ".join(f"{column}={value}" for column, value in conditions)
        raise UserError(f"no row of {', '.join(paths)} is left" + (f" with {wanted}" if wanted else ""))
    return rows.reset_index(drop=True)


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
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    conditions = []
    for text in arguments.where:
        column, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"--where takes COLUMN=VALUE, not {text}")
        conditions.append((column, value))
    rows = combine(arguments.manifests, conditions)
    write_manifest(rows, arguments.out)
    counts = rows["label"].value_counts()
    print(f"{arguments.out}: {len(rows)} rows, {counts.get(0, 0)} real, {counts.get(1, 0)} AI")
    return 0


if __name__ == "__main__":
    command_line.run(main)
