"""The flags of `python -m featdistill push`, and which of them exclude each other; without PyTorch."""

from argparse import Namespace

from featdistill.command_line import Parser, UserError


def add_arguments(parser: Parser) -> None:
    """Add the flags."""
    parser.add_argument("expert", metavar="EXPERT", help="folder of the expert")
    parser.add_argument("repository", metavar="OWNER/NAME", help="where to put it; it is made if need be")
    parser.add_argument("--dry-run", action="store_true", help="write the files to --out, upload nothing")
    parser.add_argument("--out", metavar="DIR", help="new folder for --dry-run")
    page = parser.add_argument_group("model card")
    page.add_argument(
        "--license",
        default="unknown",
        metavar="ID",
        help="license under which you offer the weights, as the Hub abbreviates it, such as apache-2.0 or "
        "cc-by-nc-4.0; check the terms of the training images and of the backbone's weights first, which the "
        "model card names (default: unknown, which says that you state none)",
    )
    page.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        metavar="FILE",
        help="metrics.json of evaluate.py for predictions of this expert alone; shown with intervals",
    )
    page.add_argument(
        "--calibrator",
        metavar="FILE",
        help="file written by python -m featdistill calibrate for this expert alone; uploaded as well",
    )
    upload = parser.add_argument_group("upload")
    upload.add_argument("--private", action="store_true", help="make a repository that only you can read")
    upload.add_argument("--message", metavar="TEXT", help="of the commit (default: Upload expert NAME)")


def check(args: Namespace) -> None:
    """Raise a `UserError` if flags do not go together."""
    if args.dry_run != bool(args.out):
        raise UserError("--dry-run and --out DIR belong together: where to write what would be uploaded")
    if args.dry_run and (args.private or args.message):
        flag = "--private" if args.private else "--message"
        raise UserError(f"{flag} has no effect with --dry-run, which uploads nothing")
