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
from featdistill.command_line import Parser, UserError, file_name, within, worker_count


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
    ensemble.add_argument(
        "--experts",
        nargs="+",
        metavar="DIR",
        help="experts' folders, hub:OWNER/NAME (docs/hub.md), onnx:DIR for exported ones, or published:NAME "
        "for published detectors (docs/published.md); by default, the experts of the last run",
    )
    ensemble.add_argument("--released", metavar="DIR", help="folder of the authors' released experts")
    ensemble.add_argument(
        "--fusion",
        default="probability_mean",
        metavar="HOW",
        help="probability_mean, logit_mean, or a file written by python -m featdistill fuse",
    )
    ensemble.add_argument("--weights", metavar="A=2,B=1", help="weights of the experts (default: equal)")
    ensemble.add_argument(
        "--tta",
        default="none",
        metavar="VIEWS",
        help="views of an image to average over: none, hflip, five_crop, scales, blur, jpeg, rapid, "
        "redelivery, or several joined by +",
    )
    ensemble.add_argument(
        "--resize",
        choices=("shorter", "squash", "crop"),
        help="how images become inputs (default: as each expert was trained)",
    )
    verdict = parser.add_argument_group("verdict")
    verdict.add_argument(
        "--calibrator",
        metavar="FILE",
        help="file written by python -m featdistill calibrate; adds real, unsure or AI, in OUT.verdicts.csv",
    )
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
    speed.add_argument(
        "--batch-size",
        default="auto",
        metavar="N",
        help="images per batch; auto: 32 on a CPU, as many as the free memory allows on a GPU",
    )
    speed.add_argument(
        "--workers",
        type=worker_count(),
        help="loader processes (default: the cores of each process; at most 32 with a GPU, 8 without)",
    )
    speed.add_argument(
        "--precision",
        metavar="NAME",
        help="arithmetic of the experts: fp32, bf16, fp16 or fp8 (default: bf16 on a GPU, and for large "
        "experts on a processor that multiplies bf16; else fp32)",
    )
    speed.add_argument(
        "--compile", action="store_true", dest="compiled", help="compile the experts first; takes a minute"
    )
    speed.add_argument("--profile", action="store_true", help="say at the end where the time went")
    speed.add_argument("--device", help="cuda, cuda:1, cpu, ... (default: a GPU if there is one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    _check_input(args)
    # Here, so that --help and mistakes are answered without loading PyTorch.
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
    for path in args.experts or ():
        if Path(path).is_file():
            raise UserError(f"--experts accepts folders, and {path} is a file; put images before --experts")
    raise UserError("nothing to score; name images, or use --split, --manifest or --images (see --help)")


if __name__ == "__main__":
    command_line.run(main)
