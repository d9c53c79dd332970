"""Score images with an ensemble of experts: P(AI-generated), averaged (paper, section 4.4, eq. 3).

    python predict.py image.jpg other.png                  a table of a few images; --json for programs
    python predict.py --split private_test                 with the experts of the last run
    python predict.py --split val val_hard public_test     several splits, one after the other
    python predict.py --images FOLDER --experts runs/paper/stage2/*/expert --out scores.csv
    python predict.py --images FOLDER --released weights   with the authors' released experts
    torchrun --nproc_per_node 8 predict.py --manifest data/test.csv            one process per GPU
    python predict.py --manifest PARTS --out SCORES        folders of parquet files, for millions of images

It writes `OUT.csv` (name, score, one column per expert), `OUT.csv.json` (what made it) and, if images could
not be read, `OUT.errors.csv`; the status is then 1. With --calibrator or --stability, `OUT.verdicts.csv` too.
The same command continues a killed run, with any number of processes. On several machines, all must see the
folder of OUT. docs/scale.md is about manifests in parts.
"""

import os
from argparse import Namespace
from pathlib import Path

# Read once, when PyTorch is loaded. Waiting threads would spin on a core that the workers need: on two
# cores that other programs used too, three runs took 1.5 to 1.8 times the processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from featdistill import command_line
from featdistill.command_line import Parser, UserError, file_name, within
from featdistill.inference.flags import FLAGS, add_flags
from featdistill.process_setup import large_imports


def build_parser() -> Parser:
    parser = Parser(description="Score images with an ensemble of experts: P(AI-generated), averaged.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("image", nargs="*", default=[], metavar="IMAGE", help="images; without --out, a table")
    what.add_argument(
        "--split", nargs="+", metavar="NAME", help="splits by name: NAME.csv in the --data folder"
    )
    what.add_argument("--manifest", nargs="+", metavar="FILE", help="manifests")
    what.add_argument("--images", metavar="DIR", help="a folder of images, including its subfolders")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of the splits' manifests (default: that of the experts' training manifest)",
    )
    parser.add_argument(
        "--out",
        help="predictions file (FILE.csv), or a folder for NAME.csv of each split (default: the folder "
        "predictions next to the stage of the last run; with --experts or --released, predictions)",
    )
    parts = parser.add_argument_group("manifest in parts", "with --manifest FOLDER and --out FOLDER")
    parts.add_argument(
        "--lease",
        type=within(1, kind=float),
        default=60,
        metavar="SECONDS",
        help="after which others take over the part of a worker that has become silent",
    )
    parts.add_argument("--status", action="store_true", help="say how far the scores in --out are")
    parts.add_argument(
        "--merge", metavar="FILE.csv", type=file_name(".csv"), help="write one file of the scores in --out"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table; only with IMAGE")
    ensemble = parser.add_argument_group("ensemble")
    last_run = {"help": f"{FLAGS['experts']['help']}; by default, the experts of the last run"}
    add_flags(ensemble, "experts", "released", "fusion", "weights", "tta", "resize", experts=last_run)
    verdict = parser.add_argument_group("verdict")
    written = {"help": f"{FLAGS['calibrator']['help']}, in OUT.verdicts.csv"}
    add_flags(verdict, "calibrator", calibrator=written)
    verdict.add_argument(
        "--stability",
        metavar="N",
        help="score N copies of each image as messengers and sites would deliver it again; near or near:N: "
        "only where the score is near a threshold",
    )
    verdict.add_argument(
        "--credentials",
        action="store_true",
        help="say what the signed Content Credentials of a file state; only with IMAGE, needs c2pa-python",
    )
    speed = parser.add_argument_group("speed")
    add_flags(speed, "batch_size", "workers", "precision", "compile", "decode", "device")
    speed.add_argument("--profile", action="store_true", help="say at the end where the time went")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    _check_input(args)
    # Here, so that --help and mistakes are answered without loading PyTorch.
    with large_imports():
        from featdistill.inference import jobs
        from featdistill.inference.processes import Processes

    return Processes().run(lambda processes: jobs.run(args, processes))


def _check_input(args: Namespace) -> None:
    if args.json and (args.out or not args.image):
        raise UserError("--json is for images given one by one, without --out")
    if args.credentials and (args.out or not args.image):
        raise UserError("--credentials is for images given one by one, without --out")
    if args.status and args.merge:
        raise UserError("--status and --merge cannot be combined; use one at a time")
    if (args.status or args.merge) and not args.out:
        raise UserError("--status and --merge need --out, the folder of scores in parts")
    if args.image or args.split or args.manifest or args.images or args.status or args.merge:
        return
    for path in args.experts:
        if Path(path).is_file():
            raise UserError(f"--experts accepts folders, and {path} is a file; put images before --experts")
    raise UserError("nothing to score; name images, or use --split, --manifest or --images (see --help)")


if __name__ == "__main__":
    command_line.run(main)
