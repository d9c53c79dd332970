"""The command line of `python -m featdistill ray`; nothing heavy is imported here."""

from featdistill.command_line import Parser, within
from featdistill.inference.flags import FLAGS, add_flags


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m featdistill ray",
        description="Score a manifest in parts with Ray Data, on a cluster that has Ray. docs/scale.md says "
        "when predict.py is enough.",
    )
    parser.add_argument("--manifest", required=True, metavar="FOLDER", help="manifest in parts")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the scores")
    parser.add_argument("--address", help="of the Ray cluster (default: RAY_ADDRESS, else this machine)")
    parser.add_argument("--actors", type=within(1), default=1, help="number of processes that score")
    parser.add_argument(
        "--gpus-per-actor", type=within(0, kind=float), default=0, metavar="N", help="share of a GPU for each"
    )
    parser.add_argument(
        "--cpus-per-actor", type=within(0, kind=float), default=1, metavar="N", help="or cores"
    )
    parser.add_argument(
        "--rows-per-call", type=within(1), default=1024, metavar="N", help="rows handed to an actor at a time"
    )
    add_flags(
        parser,
        *("experts", "fusion", "weights", "tta", "calibrator", "precision", "batch_size", "workers"),
        experts={"required": True, "help": f"{FLAGS['experts']['help']}; absolute paths"},
        precision={"help": "fp32, bf16 or fp16 (default: as predict.py)"},
        batch_size={"help": "images per batch (default: 32)"},
        workers={"help": "processes of each actor that decode images"},
    )
    return parser
