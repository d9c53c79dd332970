"""Score images with an ensemble of experts: P(AI-generated), averaged (paper, section 4.4, eq. 3).

    python predict.py image.jpg other.png                  a table of a few images; --json for programs
    python predict.py --split private_test                 with the experts of the last run
    python predict.py --split val val_hard public_test     several splits, one after the other
    python predict.py --images FOLDER --experts runs/paper/stage2/*/expert --out scores.csv
    python predict.py --images FOLDER --released weights   with the authors' released experts
    torchrun --nproc_per_node 8 predict.py --manifest data/test.csv            one process per GPU

It writes `OUT.csv` (name, score, one column per expert), `OUT.csv.json` (what made it) and, if images could
not be read, `OUT.errors.csv`; the status is then 1. The same command continues a killed run, with any number
of processes. On several machines, all must see the folder of OUT.
"""

import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

# Read once, when PyTorch is loaded. Waiting threads would spin on a core that the workers need: on two
# cores that other programs used too, three runs took 1.5 to 1.8 times the processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from featdistill import command_line
from featdistill.command_line import Parser, UserError

if TYPE_CHECKING:
    from featdistill.inference.jobs import Job
    from featdistill.inference.predictor import Predictor
    from featdistill.inference.processes import Processes

_log = logging.getLogger(__name__)


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
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table; only with IMAGE")
    ensemble = parser.add_argument_group("ensemble")
    ensemble.add_argument(
        "--experts", nargs="+", metavar="DIR", help="experts' folders (default: those of the last run)"
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
        help="views of an image to average over: none, hflip, five_crop, scales, or several joined by +",
    )
    ensemble.add_argument(
        "--resize",
        choices=("shorter", "squash", "crop"),
        help="how images become inputs (default: as each expert was trained)",
    )
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch-size",
        default="auto",
        metavar="N",
        help="images per batch; auto: 32 on a CPU, as many as the free memory allows on a GPU",
    )
    speed.add_argument(
        "--workers", type=int, help="loader processes (default: the cores of each process, at most 8)"
    )
    speed.add_argument(
        "--precision",
        metavar="NAME",
        help="arithmetic of the experts: fp32, bf16, fp16 or fp8 (default: bf16 on a GPU, fp32 on a CPU)",
    )
    speed.add_argument(
        "--compile", action="store_true", dest="compiled", help="compile the experts first; takes a minute"
    )
    speed.add_argument("--device", help="cuda, cuda:1, cpu, ... (default: a GPU if there is one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    _check_input(args)
    # Heavy modules are imported once they are needed, so that --help answers at once.
    from featdistill.inference.processes import Processes

    return Processes().run(lambda processes: _score(args, processes))


def _check_input(args: Namespace) -> None:
    if args.json and (args.out or not args.image):
        raise UserError("--json is for images given one by one, without --out")
    if args.image or args.split or args.manifest or args.images:
        return
    for path in args.experts or ():
        if Path(path).is_file():
            raise UserError(f"--experts accepts folders, and {path} is a file; put images before --experts")
    raise UserError("nothing to score; name images, or use --split, --manifest or --images (see --help)")


def _score(args: Namespace, processes: "Processes") -> int:
    from featdistill.inference import jobs

    if args.image and not args.out:
        return processes.on_main(lambda: _show_images(args))
    predictor, folders = processes.together(lambda: _load(args))
    if processes.is_main:
        several = f", {processes.world} processes" if processes.world > 1 else ""
        where = f"{predictor.device} in {predictor.precision}{several}"
        _log.info("%d experts on %s: %s", len(predictor.names), where, ", ".join(predictor.names))
    jobs_to_do = processes.on_main(lambda: _jobs(args, folders))
    return max(jobs.predict(predictor, job, processes) for job in jobs_to_do)


def _load(args: Namespace) -> tuple["Predictor", list[Path]]:
    """Return the ensemble, and the folders of those experts that are ours."""
    from featdistill.inference.predictor import load_ensemble
    from featdistill.models.expert import latest_experts

    folders = [Path(folder) for folder in args.experts or ()]
    if not folders and not args.released:
        folders = latest_experts()
    flags = ("resize", "fusion", "weights", "tta", "device", "precision", "batch_size", "workers", "compiled")
    return load_ensemble(folders, args.released, **{flag: getattr(args, flag) for flag in flags}), folders


def _show_images(args: Namespace) -> int:
    from featdistill.inference import jobs, single_images

    predictor, _ = _load(args)
    scored = single_images.score_images(predictor, jobs.images_by_path(args.image))
    print((single_images.as_json if args.json else single_images.as_table)(scored, predictor.sources))
    return int(any("error" in image for image in scored["images"]))


def _jobs(args: Namespace, folders: list[Path]) -> list["Job"]:
    """Return a job for each requested manifest; images without one get it next to their scores."""
    from featdistill.inference import jobs
    from featdistill.records.manifest import write_manifest

    by_hand = args.experts or args.released
    default_folder = Path("predictions") if by_hand else folders[0].parent.parent.parent / "predictions"
    out = Path(args.out or default_folder)
    is_file = out.suffix == ".csv"
    if args.images or args.image:
        images = Path(args.images).resolve() if args.images else None
        out = out if is_file else out / f"{images.name if images else 'images'}.csv"
        rows = jobs.images_of_folder(Path(args.images)) if images else jobs.images_by_path(args.image)
        manifest = out.with_suffix(".manifest.csv")
        write_manifest(rows, manifest)
        return [jobs.Job(manifest, out)]
    if args.manifest:
        manifests = [Path(manifest) for manifest in args.manifest]
    elif args.data or folders:
        data = Path(args.data) if args.data else jobs.data_folder(folders[0])
        manifests = jobs.split_manifests(args.split, data)
    else:
        raise UserError(
            "the released experts do not record where the splits are; use --data DIR or --manifest"
        )
    if is_file and len(manifests) > 1:
        raise UserError("--out names one file, but several splits are requested; name a folder")
    return [jobs.Job(path, out if is_file else out / f"{path.stem}.csv") for path in manifests]


if __name__ == "__main__":
    command_line.run(main)
