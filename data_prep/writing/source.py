"""What the commands of third-party data sets share: their flags, and the steps from rows to a manifest.

The module of a source has its tables of folders or columns, and a function that returns the cells of one
image; `command` does the rest. In this order: images with equal bytes are kept once where the source needs
it, counts are compared with those that were published, `--limit` takes a subset, `--holdout` splits it by
whole groups, and the manifests are written.
"""

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from data_prep.duplicates import keep_once as duplicates
from data_prep.duplicates.exact import equal_images
from data_prep.reading import files, parquet
from data_prep.reading.files import FAULT
from data_prep.writing.flags import add_flags, csv_file, existing
from data_prep.writing.manifests import check_out, take_left_out, write_manifests
from data_prep.writing.sampling import proportional_subset
from featdistill import command_line
from featdistill.command_line import Parser, UserError, counted
from featdistill.records import manifest
from featdistill.text_tables import table

_log = logging.getLogger(__name__)
LABEL_NAMES = {0: "real", 1: "AI", 2: "unlabeled"}
Cells = dict[str, object]


@dataclass(frozen=True)
class Source:
    """A data set: where it comes from and how its images are described."""

    name: str  # value of --preset and of the manifest's column source
    title: str  # what the literature calls it
    origin: str  # where to get the data
    licence: str  # terms, or `unknown`
    # Returns the cells of one image, from its ImageFile or from the values of its row in a parquet file. The
    # cell `generator` is cleared for real images.
    row: Callable[[Any], Cells]
    image_column: str = ""  # of parquet files: the column with the images' bytes, as in Image.bytes
    columns: tuple[str, ...] = ()  # of parquet files: the ones that `row` needs
    # Published number of images by (generator, label), "" for real images, before duplicates are removed.
    published: Mapping[tuple[str, int], int] | None = None
    published_total: int | None = None  # if no finer count is published
    rounding: int = 1  # published counts are multiples of this; a difference of half of it is ignored
    keep_once: bool = False  # whether images with equal bytes are kept once


def command(*sources: Source) -> Callable[[list[str] | None], int]:
    """Return the `main` of a module named like the first source; `--preset` chooses between several."""

    def main(argv: list[str] | None = None) -> int:
        args = build_parser(sources[0].name, *sources).parse_args(argv)
        source = chosen(args, *sources)
        return finish(read(source, args.root), source, args)

    return main


def build_parser(prog: str, *sources: Source) -> Parser:
    """Build the parser of the command `python -m data_prep.<prog>`."""
    about = " ".join(f"{source.title}: from {source.origin}; terms: {source.licence}." for source in sources)
    parser = Parser(
        prog=f"python -m data_prep.{prog}",
        description=f"Write the manifest of a data set that you downloaded. {about}",
    )
    parser.add_argument("--root", type=existing, required=True, help="archive or folder as downloaded")
    parser.add_argument("--out", type=csv_file, required=True, metavar="FILE.csv", help="the manifest")
    if len(sources) > 1:
        names = [source.name for source in sources]
        parser.add_argument("--preset", default=names[0], metavar="NAME", help=f"one of {', '.join(names)}")
    add_flags(parser, "limit", "holdout", "seed", "verify", "workers")
    return parser


def chosen(args: Namespace, *sources: Source) -> Source:
    """Return the source that `--preset` names, or the only one."""
    by_name = {source.name: source for source in sources}
    return by_name[command_line.one_of("preset", getattr(args, "preset", sources[0].name), by_name)]


def read(source: Source, root: str, split: str = "") -> dict[str, list]:
    """Return the columns of a manifest for the images below `root`; of parquet files, only one split's."""
    if source.image_column:
        parts = parquet.find_parts(root, split)
        return parquet.read_rows(parts, source.image_column, source.columns, source.row)
    return files.read_rows(files.find_images(root), source.row)


def finish(columns: dict[str, list], source: Source, args: Namespace) -> int:
    """Process the rows of a source as its flags request, write its manifest and return the exit status.

    Args:
        columns: for `make_manifest`; empty cells of `source` and `licence` are filled in.

    Raises:
        UserError: images with equal bytes have two labels, the hold-out leaves one side empty, or `--out` is
            not a manifest.
    """
    check_out(args.out)
    frame, left_out = take_left_out(manifest.make_manifest(columns))
    for column, value in (("source", source.name), ("licence", source.licence)):
        frame[column] = frame[column].where(frame[column] != "", value)
    frame["generator"] = frame["generator"].where(frame["label"].fillna(-1) != 0, "")
    found = _counts(frame)
    if source.keep_once:
        frame, unreadable = take_left_out(keep_once(frame))
        left_out = [*left_out, *unreadable]
    if args.limit is not None:
        frame = proportional_subset(frame, args.limit, args.seed)
    _show_counts(source, found, _counts(frame))
    return write_manifests(frame, args, left_out)


def set_cells(file: files.ImageFile, name: str, class_: str, label: int) -> Cells:
    """Return the cells of an image in a set of one generator, as in `<set>/<class>/<label>`."""
    group = "/".join(filter(None, (name, class_, file.stem)))
    return {"label": label, "generator": name, "class": class_, "group": group, "protocol_sets": name}


def keep_once(frame: pd.DataFrame) -> pd.DataFrame:
    """Remove images whose bytes equal those of an earlier row; see `duplicates.keep_once.drop_equal`.

    Where bytes cannot be read, the column `fault` says why; see `manifests.take_left_out`.
    """
    sets, faults = equal_images(frame["image"].tolist())
    if len(faults) == len(frame):
        raise UserError(f"no image can be read: {frame['image'][0]}: {faults[0]}")
    if faults:
        known = frame[FAULT] if FAULT in frame else [""] * len(frame)
        frame = frame.assign(**{FAULT: [fault or faults.get(row, "") for row, fault in enumerate(known)]})
    dropped: list[duplicates.Dropped] = []
    kept = duplicates.drop_equal(frame, sets, dropped).reset_index(drop=True)
    if dropped:
        _log.info(f"note: {counted(len(dropped), 'byte-for-byte copy')} of other images left out")
    return kept


def _counts(frame: pd.DataFrame) -> dict[tuple[str, int], int]:
    label = frame["label"].astype("object").where(frame["label"].notna(), 2)
    return frame.groupby([frame["generator"], label]).size().to_dict()


def _show_counts(source: Source, found: dict, taken: dict) -> None:
    """Show the counts by label and generator, and warn where they differ from the published ones."""
    published = source.published or {}
    lines = []
    for key in sorted({*found, *published}, key=lambda key: (key[1], key[0])):
        label = LABEL_NAMES[key[1]]
        lines.append((label, key[0], published.get(key), found.get(key, 0), taken.get(key, 0)))
    total = sum(published.values()) if published else source.published_total
    lines.append(("all", "", total, sum(found.values()), sum(taken.values())))
    cells = [["-" if cell is None else str(cell) for cell in line] for line in lines]
    header = ("label", "generator", "published", "found", "taken")
    _log.info(f"{source.title}\n{table(header, cells)}")
    absent = []
    for label, generator, expected, here, _ in lines[:-1] if published else lines:
        what = "images" if label == "all" else f"{label} images" + (generator and f" of {generator}")
        if expected is not None and here == 0:
            absent.append(generator if label == LABEL_NAMES[1] and generator else what)
        elif expected is not None and 2 * abs(here - expected) >= source.rounding:
            _log.warning(f"{here} {what} found, {expected} published")
    if absent:
        _log.warning(f"published, but not found: {', '.join(absent)}")
