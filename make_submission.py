"""Predictions to the zip for Codabench, checked before it is written; or the check of one that is there.

    python make_submission.py --profile val --val val.csv --val-hard val_hard.csv --out submission.zip
    python make_submission.py --profile test --test public_test.csv --out submission.zip --note "first try"
    python make_submission.py --check submission.zip --profile val

The profiles are the conventions that were seen: `val` (submission.csv and submission_hard.csv), `test` (the
same columns, the test file as submission_hard.csv), `test-card` (one submission.csv with `pred` and names
without extension). Every part of them can be set by a flag. What is written is listed in `submissions.csv`
beside it, and set beside the last submission.
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from featdistill import command_line
from featdistill.atomic import sha256_of
from featdistill.command_line import UserError
from featdistill.submission import ledger
from featdistill.submission.check import CheckedFile, check_submission, closest_profile
from featdistill.submission.difference import Difference, differences
from featdistill.submission.profiles import (
    EXTENSIONS,
    OFFICIAL_ROWS,
    PARTS,
    PROFILES,
    SLOTS,
    Profile,
    adapted,
    flag,
    label,
)
from featdistill.submission.writing import expected_names, prepare, replace_submission


def build_parser() -> command_line.Parser:
    parser = command_line.Parser(
        description=__doc__.split("\n\n")[0],
        epilog=f"At most {ledger.DAILY_LIMIT} submissions a day are taken: look at the numbers first.",
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help=f"convention of the zip: {', '.join(PROFILES)}; --check finds the closest one by itself",
    )
    task = parser.add_argument_group("what to do")
    for slot in SLOTS:
        task.add_argument(flag(slot), metavar="FILE", help=f"predictions of {slot}")
    task.add_argument("--out", metavar="ZIP", help="the zip to write")
    task.add_argument("--check", metavar="FILE", help="check a zip, or one CSV of it, instead of writing one")
    names = parser.add_argument_group("which images must be there")
    for slot in SLOTS:
        by_default = "by default the one in the predictions' sidecar"
        names.add_argument(f"{flag(slot)}-manifest", metavar="FILE", help=f"manifest of {slot}; {by_default}")
    names.add_argument(
        "--fill-missing", type=float, metavar="SCORE", help="score of images without a prediction, as in 0.5"
    )
    listing = parser.add_argument_group("the ledger, the list of the submissions made")
    which = listing.add_mutually_exclusive_group()
    which.add_argument("--ledger", metavar="FILE", help="by default submissions.csv beside the zip")
    which.add_argument("--no-ledger", action="store_true", help="list nothing, compare with nothing")
    listing.add_argument("--note", metavar="TEXT", help="a note for its line")
    listing.add_argument(
        "--scores", metavar="FILE", help="metrics.json of evaluate.py: its AUCs go in the line"
    )
    listing.add_argument("--date", metavar="DATE", help="ISO, in UTC; by default the clock's")
    parts = parser.add_argument_group("parts of the profile, one by one")
    parts.add_argument("--name-column", metavar="NAME", help="column of the image names")
    parts.add_argument("--score-column", metavar="NAME", help="column of the scores")
    parts.add_argument("--extension", metavar="|".join(EXTENSIONS), help="names with or without .jpg")
    parts.add_argument(
        "--index-column", action=argparse.BooleanOptionalAction, help="an unnamed column 0, 1, 2, ... first"
    )
    parts.add_argument(
        "--file-name",
        action="append",
        default=[],
        metavar="SLOT=NAME",
        help="name in the zip, as in test=submission.csv; may be given for each slot",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    slots = [slot for slot in SLOTS if getattr(args, slot)]
    if args.check and (slots or args.out):
        raise UserError("--check looks at a file that is there; give it without --out and predictions")
    lists_nothing = args.check or args.no_ledger
    if lists_nothing and any(value is not None for value in (args.note, args.scores, args.date)):
        raise UserError("--note, --scores and --date are for the ledger, to which nothing would be added")
    return _check(args) if args.check else _make(args, slots)


def _make(args: argparse.Namespace, slots: list[str]) -> int:
    if not args.profile:
        raise UserError(f"--profile is missing; known: {', '.join(PROFILES)}")
    profile = _profile(args, args.profile)
    if not args.out:
        raise UserError("--out is missing: where is the zip to be written?")
    if not args.out.endswith(".zip"):
        raise UserError(f"--out {args.out} must be the name of a .zip file")
    book = None if args.no_ledger else Path(args.ledger or Path(args.out).with_name("submissions.csv"))
    if book and book.resolve() == Path(args.out).resolve():
        raise UserError(f"--ledger {book} is the zip's own name; give another")
    when = ledger.parse_date(args.date) if args.date else datetime.now(UTC)
    local_aucs = ledger.read_aucs(args.scores) if args.scores else ""
    parts = {}
    for slot in slots:
        parts[slot] = prepare(getattr(args, slot), getattr(args, f"{slot}_manifest"), args.fill_missing)
        if parts[slot].filled:
            print(f"{slot}: missing rows filled with {args.fill_missing}: {len(parts[slot].filled):,}")
    with replace_submission(args.out, parts, profile) as (archive, files):
        # Compared while the former zip of this name, likely the last submission, is still there.
        compared, obstacle = _compare(book, files, sha256_of(archive)) if book else (None, None)
    _report(args.out, files, args.profile, "written and checked")
    _report_differences(compared)
    if not book:
        return 0
    try:
        line = ledger.entry(
            book,
            args.out,
            files,
            when=when,
            profile=label(args.profile, profile),
            predictions=[getattr(args, slot) for slot in slots],
            local_aucs=local_aucs,
            note=args.note or "",
        )
        _report_day(book, ledger.add(book, line), line["date"][:10])
    except (UserError, OSError) as error:
        # The zip is what matters: it is kept, and the same command lists it once the ledger is mended.
        raise UserError(f"{args.out} is written and good, but it is not listed: {error}") from error
    if obstacle:
        print(f"warning: not compared with the last submission: {obstacle}")
    return 0


def _check(args: argparse.Namespace) -> int:
    name = args.profile or closest_profile(args.check)
    profile = _profile(args, name)
    manifests = {slot: getattr(args, f"{slot}_manifest") for slot in SLOTS}
    expected = {slot: expected_names(manifest) for slot, manifest in manifests.items() if manifest}
    for slot in expected:
        if slot not in profile.files:
            raise UserError(f"profile {name} has no file for {slot}; it has {', '.join(profile.files)}")
    try:
        files = check_submission(args.check, profile, expected)
    except UserError as error:
        chosen = "" if args.profile else f" (checked as profile {name}, the closest one; --profile sets it)"
        raise UserError(f"{error}{chosen}") from error
    _report(args.check, files, name, "checked")
    for file in files:
        official = OFFICIAL_ROWS.get(file.slot)
        if official and not expected and file.rows != official:
            print(
                f"warning: {file.file} has {file.rows:,} rows; the challenge's {file.slot} has {official:,}"
            )
    if not expected:
        print(
            "\nThe names were not compared: give the manifests (--val-manifest ...) to find missing images."
        )
    book = Path(args.ledger or Path(args.check).with_name("submissions.csv"))
    if args.ledger and not book.is_file():
        raise UserError(f"--ledger {book} does not exist")
    if not args.no_ledger and book.is_file():
        compared, obstacle = _compare(book, files, sha256_of(args.check))
        _report_differences(compared)
        if obstacle:
            print(f"warning: not compared with the last submission: {obstacle}")
    return 0


def _profile(args: argparse.Namespace, name: str) -> Profile:
    return adapted(name, args.file_name, **{part: getattr(args, part) for part in PARTS})


def _compare(
    book: Path, files: list[CheckedFile], sha256: str
) -> tuple[list[Difference] | None, Exception | None]:
    """Return the differences from the last submission, or None and why there are none."""
    try:
        return differences(book, files, sha256), None
    except (UserError, OSError) as error:
        return None, error


def _report(path: str, files: list[CheckedFile], profile: str, what: str) -> None:
    print(f"{path}: {what}, profile {profile}")
    print(f"SHA-256 {sha256_of(path)}\n")
    table = pd.DataFrame(
        {
            "file": [file.file for file in files],
            "rows": [f"{file.rows:,}" for file in files],
            "mean score": [f"{file.mean_score:.4f}" for file in files],
            "above 0.5": [f"{100 * file.share_above_half:.1f} %" for file in files],
            "SHA-256": [file.sha256 for file in files],
        }
    )
    print(table.to_string(index=False))
    for file in files:
        if file.tied:
            print(
                f"warning: {file.file}: {file.tied:,} of {file.rows:,} rows share their score with another; "
                "what ties is not ranked"
            )
    rows = {file.file: file.rows for file in files}
    if rows.get("submission_hard.csv", 0) > rows.get("submission.csv", float("inf")):
        print("warning: submission_hard.csv has more rows than submission.csv: are the two swapped?")


def _report_differences(compared: list[Difference] | None) -> None:
    if compared is None:
        return
    if not compared:
        print("\nThere is no other listed submission of these images to compare with.")
        return
    print("\nBeside the last submission:")
    correlations = [one.rank_correlation for one in compared]
    table = pd.DataFrame(
        {
            "slot": [one.slot for one in compared],
            "images": [f"{one.images:,}" for one in compared],
            "rank correlation": ["n/a" if value is None else f"{value:.4f}" for value in correlations],
            "mean |difference|": [f"{one.mean_absolute:.4f}" for one in compared],
            "change sides of 0.5": [f"{100 * one.changed_sides:.1f} %" for one in compared],
            "last": [f"{one.file} of {one.date}" for one in compared],
        }
    )
    print(table.to_string(index=False))


def _report_day(book: Path, count: int, day: str) -> None:
    print(f"\n{book}: {count} listed for {day} (UTC); the challenge takes {ledger.DAILY_LIMIT} a day")
    if count > ledger.DAILY_LIMIT:
        print("warning: more are listed than the challenge takes on that day; see which were uploaded")


if __name__ == "__main__":
    command_line.run(main)
