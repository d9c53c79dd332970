"""The flags of `python -m featdistill probe`; without PyTorch."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from featdistill.command_line import Parser, UserError, within

if TYPE_CHECKING:
    from featdistill.bank.probe_plan import Settings

_BALANCES = ("none", "class", "source", "class_source", "class_scale")


def add_arguments(parser: Parser) -> None:
    """Add the flags in groups."""
    what = parser.add_argument_group("banks and output")
    what.add_argument(
        "--bank",
        nargs="+",
        required=True,
        metavar="BANK",
        help="made by embed; several, of the same images, get one head on their features side by side",
    )
    what.add_argument(
        "--score",
        nargs="+",
        default=[],
        metavar="BANK",
        help="score the views of these banks, of the same backbones and in the same order (default: those of "
        "--bank)",
    )
    what.add_argument("--out", required=True, metavar="DIR", help="folder of the experts, scores and tables")
    what.add_argument(
        "--no-experts",
        action="store_true",
        help="write scores and tables only; experts are as large as a backbone",
    )
    fitted = parser.add_argument_group("heads")
    fitted.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="features that the bank holds, such as class+mean:8,10; for several banks one for all, or one "
        "for each, joined by / (default: those that the bank was made for)",
    )
    fitted.add_argument(
        "--head", choices=("linear", "mlp"), default="linear", help="logistic regression, or MLP"
    )
    fitted.add_argument(
        "--balance", choices=_BALANCES, default="none", help="what counts equally in training, as in recipes"
    )
    fitted.add_argument(
        "--seed", type=within(0, 2**32 - 1), default=0, help="random seed of folds and of an MLP"
    )
    images = parser.add_argument_group("images and views")
    images.add_argument(
        "--train",
        nargs="+",
        default=[],
        metavar="COLUMN=VALUE",
        help="train on these images, and score the others as hold-out (default: train on all)",
    )
    images.add_argument(
        "--views",
        nargs="+",
        default=[],
        metavar="NAME",
        help="views to train on, or all (default: all but the content control)",
    )
    held = images.add_mutually_exclusive_group()
    held.add_argument(
        "--folds",
        metavar="COLUMN|N",
        help="score training images by heads without their fold, which also chooses the regularization: the "
        "values of a column, or N folds of whole groups (default: the column fold if there is one, else 5)",
    )
    held.add_argument(
        "--leave-out",
        metavar="COLUMN",
        help="instead of folds: leave out each value of a column, such as source or generator",
    )


def settings_of(args: Namespace) -> "Settings":
    """Return the settings of a command line.

    Raises:
        UserError: a bank does not exist or is named twice.
    """
    for flag, paths in (("--bank", args.bank), ("--score", args.score)):
        for path in paths:
            if not Path(path).is_dir():
                raise UserError(
                    f"{flag}: {path} is not a folder; make a bank with python -m featdistill embed"
                )
        if len({Path(path).resolve() for path in paths}) < len(paths):
            raise UserError(f"{flag} names a bank twice")
    from featdistill.bank.heads import HeadOptions
    from featdistill.bank.probe_plan import Settings

    return Settings(
        banks=args.bank,
        score=args.score,
        features=args.features,
        train=args.train,
        views=args.views,
        folds=args.folds,
        leave_out=args.leave_out,
        balance=args.balance,
        head=HeadOptions(args.head, seed=args.seed),
        seed=args.seed,
        write_experts=not args.no_experts,
    )
