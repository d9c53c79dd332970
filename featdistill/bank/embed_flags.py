"""The flags of `python -m featdistill embed`, and which of them exclude each other; without PyTorch."""

from argparse import Namespace

from featdistill.command_line import Parser, UserError, within
from featdistill.inference.flags import add_flags
from featdistill.recipe_groups import check_weights
from featdistill.remote_files import check_manifests


def add_arguments(parser: Parser) -> None:
    """Add the flags in groups."""
    what = parser.add_argument_group("backbone")
    source = what.add_mutually_exclusive_group(required=True)
    source.add_argument("--backbone", metavar="NAME", help="short name, timm:NAME or open_clip:NAME")
    source.add_argument(
        "--expert", metavar="DIR", help="a trained expert (or hub:OWNER/NAME), whose backbone is taken"
    )
    what.add_argument("--weights", help="of --backbone: hub, random, or a local file (default: hub)")
    what.add_argument("--input-size", type=within(1), metavar="PX", help="side of the input of --backbone")
    what.add_argument(
        "--resize",
        choices=("shorter", "squash", "crop"),
        help="how images become inputs of --backbone (default: shorter)",
    )
    images = parser.add_argument_group("images and output")
    images.add_argument(
        "--manifest", nargs="+", required=True, metavar="FILE", help="images; labels may be missing"
    )
    images.add_argument("--out", required=True, metavar="BANK", help="folder of the bank")
    kept = parser.add_argument_group("what is kept of each view")
    kept.add_argument(
        "--features",
        nargs="+",
        default=["pool"],
        metavar="TEXT",
        help="features as in recipes: pool, projection, mean_tokens, layers:6,8,10,12, ... (default: pool)",
    )
    kept.add_argument("--keep-tokens", action="store_true", help="the patch tokens of the last layer as well")
    kept.add_argument(
        "--tokens-before-last",
        type=within(0),
        default=0,
        metavar="N",
        help="what the last N blocks receive, for train.py --finetune last_n to start from (default: 0, no)",
    )
    kept.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="of the files (default: float16)"
    )
    views = parser.add_argument_group("views of each image")
    views.add_argument(
        "--views",
        type=within(1),
        default=1,
        metavar="N",
        help="the clean image and N - 1 others (default: 1)",
    )
    views.add_argument(
        "--distortions", metavar="POLICY", help="of the others: a preset with changes, as in recipes"
    )
    views.add_argument(
        "--draw",
        choices=("training", "evaluation"),
        default="training",
        help="show the others as N - 1 epochs of training would, with its crops and mirroring, or as scored "
        "images with N - 1 seeds (default: training)",
    )
    views.add_argument("--crop", choices=("random", "center", "random_resized"), help="with --draw training")
    views.add_argument("--flip", type=within(0, 1, float), metavar="P", help="with --draw training")
    views.add_argument(
        "--stage",
        type=int,
        choices=(1, 2),
        default=1,
        help="of training, with --draw training; stage 2 draws anew (default: 1)",
    )
    views.add_argument(
        "--control-side",
        type=within(1),
        metavar="PX",
        help="add the clean view reduced to this side and enlarged again: 28, an eighth of an input of 224 "
        "px, leaves what it shows and no trace of a generator",
    )
    views.add_argument(
        "--seed", type=within(0, 2**32 - 1), default=0, help="random seed of what is drawn (default: 0)"
    )
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch-size", type=within(1), default=32, metavar="N", help="images per batch (default: 32)"
    )
    add_flags(speed, "workers", "device")
    speed.add_argument(
        "--precision", metavar="NAME", help="fp32, bf16 or fp16 (default: bf16 on a GPU, fp32 on a CPU)"
    )


def check(args: Namespace) -> None:
    """Refuse files that do not exist and flags that have no effect, before anything takes time.

    Raises:
        UserError: there is one.
    """
    check_manifests(args.manifest)
    if args.expert:
        for flag in ("weights", "input_size", "resize"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')} is for --backbone; an expert has its own")
    else:
        check_weights(args.weights or "hub")
    if args.views > 1 and args.distortions is None:
        raise UserError(
            f"--views {args.views} needs --distortions, such as official; with --distortions none, the other "
            "views are only cropped and mirrored"
        )
    drawn = ("distortions", "crop", "flip") if args.views == 1 else ()
    drawn = ("crop", "flip") if args.draw == "evaluation" and not drawn else drawn
    for flag in drawn:
        if getattr(args, flag) is not None:
            where = "--views 2 or more" if args.views == 1 else "--draw training"
            raise UserError(f"--{flag} has an effect with {where} only")
