"""The command line of `python -m featdistill ray`; nothing heavy is imported here."""

from featdistill.command_line import Parser, within, worker_count


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m featdistill ray",
        description="Score a manifest in parts with Ray Data, on a cluster that has Ray. docs/scale.md says "
        "when predict.py is enough.",
    )
    parser.add_argument("--manifest", required=True, metavar="FOLDER", help="manifest in parts")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the scores")
    parser.add_argument(
        "--experts", nargs="+", required=True, metavar="DIR", help="experts, as of predict.py; absolute paths"
    )
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
    parser.add_argument("--workers", type=worker_count(), help="processes of each actor that decode images")
    parser.add_argument("--batch-size", metavar="N", help="images per batch (default: 32)")
    for flag in ("fusion", "weights", "tta", "precision", "calibrator"):
        parser.add_argument(f"--{flag}", help="as of predict.py")
    return parser
