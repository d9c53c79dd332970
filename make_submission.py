"""Make the zip for Codabench from predictions and check it before it is written; or check an existing one.

    python make_submission.py --profile val --val val.csv --val-hard val_hard.csv --out submission.zip
    python make_submission.py --profile test --test public_test.csv --out submission.zip --note "first try"
    python make_submission.py --check submission.zip --profile val

The profiles are the known conventions: `val` (submission.csv and submission_hard.csv), `test` (the same
columns, the test file as submission_hard.csv), `test-card` (one submission.csv with `pred` and names without
extension). Every part of them can be changed by a flag. Each zip is listed in `submissions.csv` next to it,
and compared with the previous submission.
"""

import argparse

from featdistill import command_line
from featdistill.command_line import UserError
from featdistill.submission.profiles import DAILY_LIMIT, EXTENSIONS, PROFILES, SLOTS, flag


def build_parser() -> command_line.Parser:
    parser = command_line.Parser(
        description=__doc__.split("\n\n")[0],
        epilog=f"The challenge accepts {DAILY_LIMIT} submissions per day: look at the numbers first.",
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help=f"convention of the zip: {', '.join(PROFILES)}; --check finds the closest one itself",
    )
    task = parser.add_argument_group("what to do")
    for slot in SLOTS:
        task.add_argument(flag(slot), metavar="FILE", help=f"predictions of {slot}")
    task.add_argument("--out", metavar="ZIP", help="the zip to write")
    task.add_argument(
        "--check", metavar="FILE", help="check a zip, or one CSV for it, instead of writing one"
    )
    names = parser.add_argument_group("which images are expected")
    for slot in SLOTS:
        default = "by default the one in the predictions' sidecar"
        names.add_argument(f"{flag(slot)}-manifest", metavar="FILE", help=f"manifest of {slot}; {default}")
    score, description = command_line.within(0, 1, float), "score of images without a prediction"
    names.add_argument("--fill-missing", type=score, metavar="SCORE", help=description)
    listing = parser.add_argument_group("the ledger, a list of all submissions")
    which = listing.add_mutually_exclusive_group()
    which.add_argument("--ledger", metavar="FILE", help="by default submissions.csv next to the zip")
    which.add_argument("--no-ledger", action="store_true", help="do not list or compare the submission")
    listing.add_argument("--note", metavar="TEXT", help="a note to list with the submission")
    listing.add_argument(
        "--scores", metavar="FILE", help="metrics.json of evaluate.py, whose AUCs are listed as well"
    )
    listing.add_argument("--date", metavar="DATE", help="ISO 8601, in UTC; by default now")
    parts = parser.add_argument_group("parts of the profile")
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
        help="name in the zip, as in test=submission.csv; can be given for each slot",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.check and (args.out or any(getattr(args, slot) for slot in SLOTS)):
        raise UserError("--check reads an existing file; use it without --out and predictions")
    if (args.check or args.no_ledger) and any(
        value is not None for value in (args.note, args.scores, args.date)
    ):
        raise UserError("--note, --scores and --date are for the ledger, but nothing would be listed")
    # pandas takes a second to import, which --help can do without.
    from featdistill.submission import command

    command.check(args) if args.check else command.make(args)
    return 0


if __name__ == "__main__":
    command_line.run(main)
