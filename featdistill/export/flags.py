"""The flags of `python -m featdistill export`; without PyTorch."""

from argparse import Namespace

from featdistill.command_line import Parser, UserError, within
from featdistill.inference.flags import add_flags
from featdistill.remote_files import check_manifests


def add_arguments(parser: Parser) -> None:
    """Add the flags in groups."""
    parser.add_argument(
        "experts", nargs="+", metavar="EXPERT", help="folder of an expert, or another name of one in PyTorch"
    )
    what = parser.add_argument_group("graph")
    what.add_argument(
        "--format",
        required=True,
        choices=("onnx", "openvino"),
        help="onnx, which ONNX Runtime and most others run, or openvino",
    )
    what.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "fp16", "int8"),
        help="fp16: weights of half the size, arithmetic as before; int8: matrix products in 8-bit integers",
    )
    add_flags(what, "fusion", "weights")
    what.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    images = parser.add_argument_group("check against the experts, on real images")
    source = images.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--manifest", nargs="+", metavar="FILE", help="images with labels, which --precision int8 needs"
    )
    source.add_argument("--images", metavar="DIR", help="a folder of images")
    images.add_argument(
        "--limit",
        type=within(8),
        default=512,
        metavar="N",
        help="compare N of the images, evenly spaced",
    )
    add_flags(images, "workers", workers={"default": 0, "help": "loader processes"})


def check(args: Namespace) -> None:
    """Refuse what cannot work before anything takes time.

    Raises:
        UserError: a manifest is missing, or int8 has no labels.
    """
    check_manifests(args.manifest or ())
    if args.precision == "int8" and not args.manifest:
        raise UserError("--precision int8 is checked by the AUC; name labeled images with --manifest")
