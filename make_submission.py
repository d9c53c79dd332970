"""Predictions to the zip for Codabench, checked before it is written; or the check of one that is there.

    python make_submission.py --profile val --val val.csv --val-hard val_hard.csv --out submission.zip
    python make_submission.py --profile test --test public_test.csv --out submission.zip
    python make_submission.py --check submission.zip --profile val

The profiles are the conventions that were seen: `val` (submission.csv and submission_hard.csv), `test` (the
same columns, the test file as submission_hard.csv), `test-card` (one submission.csv with `pred` and names
without extension). Every part of them can be set by a flag.
"""

import argparse
import dataclasses
import sys

import pandas as pd

from featdistill import command_line
from featdistill.atomic import sha256_of
from featdistill.command_line import UserError
from featdistill.submission import (
    EXTENSIONS,
    PROFILES,
    SLOTS,
    FileSummary,
    Profile,
    check_submission,
    expected_names,
    prepare,
    read_members,
    write_submission,
)


def build_parser() -> command_line.Parser:
    parser = command_line.Parser(
        description=__doc__.split("\n\n")[0],
        epilog="At most 5 submissions a day are taken: look at the printed numbers before the upload.",
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help=f"convention of the zip: {', '.join(PROFILES)}; --check finds the closest one by itself",
    )
    task = parser.add_argument_group("what to do")
    for slot in SLOTS:
        flag = slot.replace("_", "-")
        task.add_argument(f"--{flag}", metavar="FILE", help=f"predictions of {slot}")
    task.add_argument("--out", metavar="ZIP", help="the zip to write")
    task.add_argument("--check", metavar="FILE", help="check a zip, or one CSV of it, instead of writing one")
    names = parser.add_argument_group("which images must be there")
    for slot in SLOTS:
        flag = slot.replace("_", "-")
        by_default = "by default the one in the predictions' sidecar"
        names.add_argument(f"--{flag}-manifest", metavar="FILE", help=f"manifest of {slot}; {by_default}")
    names.add_argument(
        "--fill-missing", type=float, metavar="SCORE", help="score of images without a prediction, as in 0.5"
    )
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
    given = [slot for slot in SLOTS if getattr(args, slot)]
    if args.check:
        if given or args.out:
            raise UserError("--check looks at a file that is there; give it without --out and predictions")
        return _check(args)
    if not args.profile:
        raise UserError(f"--profile is missing; known: {', '.join(PROFILES)}")
    profile = _profile(args, args.profile)
    if not args.out:
        raise UserError("--out is missing: where is the zip to be written?")
    parts = {}
    for slot in given:
        parts[slot] = prepare(getattr(args, slot), getattr(args, f"{slot}_manifest"), args.fill_missing)
        if parts[slot].filled:
            print(f"{slot}: missing rows filled with {args.fill_missing}: {len(parts[slot].filled):,}")
    summaries = write_submission(args.out, parts, profile)
    _report(args.out, summaries, args.profile, "written and checked")
    return 0


def closest_profile(path: str) -> str:
    """Return the name of the profile whose files and columns a submission fits best, the first of equals."""
    members = read_members(path, path)
    first_line = next(iter(members.values()), b"").split(b"\n", 1)[0].decode("utf-8", "replace")
    columns = first_line.strip().removeprefix("\ufeff").split(",")

    def fit(name: str) -> int:
        profile = PROFILES[name]
        needed = {profile.files[slot] for slot in profile.required}
        fits_files = 0 if None in members else -len(needed.symmetric_difference(members))
        # A score column settles it, as no two conventions of equal columns differ by more than two files.
        return fits_files + 4 * (profile.score_column in columns)

    return max(PROFILES, key=fit)


def _check(args: argparse.Namespace) -> int:
    name = args.profile or closest_profile(args.check)
    profile = _profile(args, name)
    manifests = {slot: getattr(args, f"{slot}_manifest") for slot in SLOTS}
    expected = {slot: expected_names(manifest) for slot, manifest in manifests.items() if manifest}
    for slot in expected:
        if slot not in profile.files:
            raise UserError(f"profile {name} has no file for {slot}; it has {', '.join(profile.files)}")
    try:
        summaries = check_submission(args.check, profile, expected)
    except UserError as error:
        chosen = "" if args.profile else f" (checked as profile {name}, the closest one; --profile sets it)"
        raise UserError(f"{error}{chosen}") from error
    _report(args.check, summaries, name, "checked")
    if not expected:
        print(
            "\nThe names were not compared: give the manifests (--val-manifest ...) to find missing images."
        )
    return 0


def _profile(args: argparse.Namespace, name: str) -> Profile:
    """Return a named profile with the parts that the command line sets."""
    profile = PROFILES[command_line.one_of("profile", name, PROFILES)]
    if args.extension:
        command_line.one_of("--extension", args.extension, EXTENSIONS)
    files = dict(profile.files)
    for pair in args.file_name:
        slot, separator, file = pair.partition("=")
        if not separator:
            raise UserError(f"--file-name {pair}: give it as SLOT=NAME, as in test=submission.csv")
        files[command_line.one_of("slot", slot, files)] = file
    # An optional file makes room: a test file may take the name that a validation file has by default.
    needed = {files[slot] for slot in profile.required}
    files = {slot: file for slot, file in files.items() if slot in profile.required or file not in needed}
    parts = ("name_column", "score_column", "extension", "index_column")
    changes = {part: getattr(args, part) for part in parts if getattr(args, part) is not None}
    return dataclasses.replace(profile, files=files, **changes)


def _report(path: str, summaries: list[FileSummary], profile: str, what: str) -> None:
    print(f"{path}: {what}, profile {profile}")
    print(f"SHA-256 {sha256_of(path)}\n")
    table = pd.DataFrame(
        {
            "file": [summary.file for summary in summaries],
            "rows": [f"{summary.rows:,}" for summary in summaries],
            "mean score": [f"{summary.mean_score:.4f}" for summary in summaries],
            "above 0.5": [f"{100 * summary.share_above_half:.1f} %" for summary in summaries],
            "SHA-256": [summary.sha256 for summary in summaries],
        }
    )
    print(table.to_string(index=False))
    rows = {summary.file: summary.rows for summary in summaries}
    if rows.get("submission.csv", sys.maxsize) < rows.get("submission_hard.csv", 0):
        print("\nsubmission_hard.csv has more rows than submission.csv: are the two swapped?")


if __name__ == "__main__":
    command_line.run(main)
