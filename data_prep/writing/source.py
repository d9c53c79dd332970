"""What the sources of third-party images share: their flags, and the way from rows to a manifest.

A source's own file says which rows its data give; `finish` does the rest, in this order: equal files are kept
once where the source asks for it, what was found is held against what the publishers promise, `--limit` takes
a subset, `--holdout` splits it by whole groups, and the manifests are written.
"""

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from data_prep.duplicates import keep_once as kept_once
from data_prep.duplicates.exact import equal_images
from data_prep.reading import archives
from featdistill import command_line
from featdistill.command_line import Parser, UserError
from featdistill.records import manifest
from featdistill.seeds import hash_ranks

LABEL_NAMES = {0: "real", 1: "AI", 2: "unlabelled"}


@dataclass(frozen=True)
class Source:
    """Where images come from and what is known of them.

    Attributes:
        name: value of `--preset` and of the manifest's column `source`.
        title: what the field calls it.
        origin: where its data are, for a person who looks for them.
        licence: terms, or `unknown`; the manifest's column `licence`.
        promised: images by (generator, label), as its publishers count them before copies are left out;
            real images are those of generator "". None where no count is published.
        rounding: the step of the published counts; found and promised may differ by half of it.
        keep_once: whether images whose bytes are equal are kept once.
        promised_images: all images, where no finer count is published.
    """

    name: str
    title: str
    origin: str
    licence: str
    promised: Mapping[tuple[str, int], int] | None = None
    rounding: int = 1
    keep_once: bool = False
    promised_images: int | None = None


def build_parser(prog: str, *sources: Source) -> Parser:
    """Build the parser of a source's command; several sources are told apart by `--preset`.

    Args:
        prog: name of the module in `data_prep`.
    """
    about = " ".join(f"{source.title}: from {source.origin}; terms: {source.licence}." for source in sources)
    parser = Parser(
        prog=f"python -m data_prep.{prog}",
        description=f"Write the manifest of a data set that you downloaded. {about}",
    )
    parser.add_argument(
        "--root",
        required=True,
        help="the data as downloaded: a folder, with archives or unpacked, or an archive",
    )
    parser.add_argument("--out", required=True, metavar="FILE.csv", help="the manifest")
    if len(sources) > 1:
        names = [source.name for source in sources]
        parser.add_argument("--preset", default=names[0], metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="take N images, of each label and generator its share"
    )
    parser.add_argument(
        "--holdout", type=float, metavar="SHARE", help="share of the images to write to FILE.holdout.csv"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed takes and holds out other images")
    parser.add_argument("--verify", action="store_true", help="decode every image and leave broken ones out")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that verify")
    return parser


def parse(parser: Parser, argv: list[str] | None) -> Namespace:
    """Parse a command line and check the shared flags, so that a long walk does not end in a wrong one."""
    args = parser.parse_args(argv)
    if not os.path.exists(args.root):
        raise UserError(f"--root {args.root} does not exist")
    if Path(args.out).suffix != ".csv":
        raise UserError(f"--out {args.out} must be the name of a .csv file")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be 1 or more, not {args.limit}")
    if args.holdout is not None and not 0 < args.holdout < 1:
        raise UserError(f"--holdout must lie between 0 and 1, not {args.holdout}")
    if args.workers < 1:
        raise UserError(f"--workers must be 1 or more, not {args.workers}")
    return args


def chosen(args: Namespace, *sources: Source) -> Source:
    """Return the source that `--preset` names."""
    by_name = {source.name: source for source in sources}
    return by_name[command_line.one_of("preset", args.preset, by_name)]


def finish(rows: pd.DataFrame | dict[str, list], source: Source, args: Namespace) -> int:
    """Do with a source's rows what its flags ask for, and write its manifest.

    Args:
        rows: a manifest, or columns for `make_manifest`; an empty `source` or `licence` is filled in.

    Returns:
        The exit status: 1 where images could not be read and are left out.

    Raises:
        UserError: equal images have two labels, or the hold-out leaves one side empty.
    """
    frame = manifest.make_manifest(rows) if isinstance(rows, dict) else rows.reset_index(drop=True)
    for column, value in (("source", source.name), ("licence", source.licence)):
        frame[column] = frame[column].where(frame[column] != "", value)
    found = _counts(frame)
    if source.keep_once:
        frame = keep_once(frame)
    if args.limit is not None:
        frame = proportional_subset(frame, args.limit, args.seed)
    _print_table(source, found, _counts(frame))
    return write_manifests(frame, args)


def keep_once(frame: pd.DataFrame, *, must_read: bool = False) -> pd.DataFrame:
    """Leave out images whose bytes are equal to those of a row before.

    The groups of equal images become one group, and the sets of a column `protocol_sets` are joined in the
    row that stays. Images that cannot be read are not compared.

    Args:
        must_read: an image that cannot be read is an error.

    Raises:
        UserError: two equal images have different labels, or one cannot be read that must be.
    """
    dropped: list[kept_once.Dropped] = []
    sets, faults = equal_images(frame["image"].tolist())
    if must_read and faults:
        place, fault = next(iter(faults.items()))
        raise UserError(f"cannot read {frame['image'][place]}: {fault}")
    kept = kept_once.drop_equal(frame, sets, dropped).reset_index(drop=True)
    if dropped:
        print(f"note: {len(dropped)} images are copies of others, byte for byte, and are left out")
    return kept


def proportional_subset(frame: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """Return `limit` rows, of each (label, generator) its share, in the order of the rows.

    Shares are rounded by the largest remainder. Of each stratum the rows with the smallest hash of (seed,
    name) are taken, so that a smaller limit takes a part of what a larger one takes, up to the rounding.
    """
    if limit >= len(frame):
        return frame
    key = frame["label"].astype("string").fillna("") + "/" + frame["generator"]
    rows = key.value_counts(sort=False).sort_index()
    shares = {name: divmod(limit * int(count), len(frame)) for name, count in rows.items()}
    take = {name: whole for name, (whole, _) in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (-shares[name][1], name))
    for name in by_remainder[: limit - sum(take.values())]:
        take[name] += 1
    table = pd.DataFrame({"key": key})
    table["hash"] = hash_ranks(frame["name"], seed)
    place = table.sort_values("hash", kind="stable").groupby("key").cumcount()
    return frame[place.reindex(frame.index) < key.map(take).astype("int64")].reset_index(drop=True)


def _counts(frame: pd.DataFrame) -> dict[tuple[str, int], int]:
    label = frame["label"].astype("object").where(frame["label"].notna(), 2)
    return frame.groupby([frame["generator"], label]).size().to_dict()


def _print_table(source: Source, found: dict, taken: dict) -> None:
    """Print the counts by generator and label, and a warning where they are not what was promised."""
    promised = source.promised or {}
    lines = []
    for key in sorted({*found, *promised}, key=lambda key: (key[1], key[0])):
        label = LABEL_NAMES[key[1]]
        lines.append((key[0], label, promised.get(key), found.get(key, 0), taken.get(key, 0)))
    total = sum(promised.values()) if promised else source.promised_images
    lines.append(("", "all", total, sum(found.values()), sum(taken.values())))
    width = max(len("generator"), *(len(line[0]) for line in lines))
    print(f"{source.title}\n{'label':10}  {'generator':{width}} {'promised':>9} {'found':>9} {'taken':>9}")
    for generator, label, expected, here, kept in lines:
        expected = "-" if expected is None else expected
        print(f"{label:10}  {generator:{width}} {expected:>9} {here:9} {kept:9}")
    missing = []
    for generator, label, expected, here, _ in lines[:-1] if promised else lines:
        what = "images" if label == "all" else f"{label} images" + (generator and f" of {generator}")
        if expected is not None and here == 0:
            missing.append(generator if label == LABEL_NAMES[1] and generator else what)
        elif expected is not None and 2 * abs(here - expected) >= source.rounding:
            print(f"warning: {here} {what} are here, {expected} are promised")
    if missing:
        print(f"warning: promised, but none are here: {', '.join(missing)}")


def write_manifests(frame: pd.DataFrame, args: Namespace) -> int:
    """Write a manifest to `args.out`, and with `args.holdout` the rows held out beside it.

    With `args.verify`, images that cannot be read are left out of either.

    Returns:
        The exit status.
    """
    out = Path(args.out)
    held_path = out.with_suffix(".holdout.csv")
    frames = {out: frame}
    if args.holdout is not None:
        training, held = manifest.split_holdout(frame, args.holdout, args.seed)
        frames = {out: training, held_path: held}
    elif held_path.exists():
        print(f"note: {held_path}, of an earlier run, is removed: its rows are in {out}")
    # Beside a new manifest, an earlier run's hold-out would be rows that are trained on.
    held_path.unlink(missing_ok=True)
    unreadable = 0
    for path, part in frames.items():
        real, ai = ((part["label"] == label).sum() for label in (0, 1))
        print(f"{path}: {len(part)} images, {real} real, {ai} AI, of {part['source'].nunique()} sources")
        unreadable += archives.write_readable(part, path, verify=args.verify, workers=args.workers)
    return 1 if unreadable else 0
