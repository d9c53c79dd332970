"""Score images with an ensemble of experts: P(AI-generated), averaged (paper, section 4.4, eq. 3).

    python predict.py image.jpg other.png                  a table of a few images; --json for programs
    python predict.py --split private_test                 with the experts of the last run
    python predict.py --split val val_hard public_test     several splits, one after the other
    python predict.py --images FOLDER --experts runs/paper/stage2/*/expert --out scores.csv
    python predict.py --images FOLDER --released weights   with the authors' released experts
    torchrun --nproc_per_node 8 predict.py --manifest data/test.csv            one process a GPU

It writes `OUT.csv` (name, score, a column an expert), `OUT.csv.json` (what made it) and, where images could
not be read, `OUT.errors.csv`; the status is then 1. A run that was killed is continued by the same command,
also by another number of processes. On several machines the folder of OUT must be one that all of them see.
"""

import os
from argparse import Namespace
from pathlib import Path

# Read once, when PyTorch is loaded. Threads that wait would else spin on a core that the workers need: on two
# cores that other programs used too, three runs took 1.5 to 1.8 times the processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from featdistill import command_line
from featdistill.command_line import Parser, UserError
from featdistill.data.views import TTA
from featdistill.inference import jobs as prediction_jobs
from featdistill.inference import single_images
from featdistill.inference.compute import DEFAULT_BATCH_SIZE, PRECISIONS
from featdistill.inference.jobs import Job
from featdistill.inference.predictor import Predictor, load_ensemble
from featdistill.inference.processes import Process
from featdistill.models.expert import latest_experts

RESIZES = ("shorter", "squash", "crop")


def build_parser() -> Parser:
    parser = Parser(description="Score images with an ensemble of experts: P(AI-generated), averaged.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("image", nargs="*", default=[], metavar="IMAGE", help="images; without --out, a table")
    what.add_argument(
        "--split", nargs="+", metavar="NAME", help="splits by name: NAME.csv in the --data folder"
    )
    what.add_argument("--manifest", nargs="+", metavar="FILE", help="manifests")
    what.add_argument("--images", metavar="DIR", help="a folder of images, searched with all its subfolders")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of the splits' manifests (default: where the experts' training manifest lies)",
    )
    parser.add_argument(
        "--out",
        help="predictions file (FILE.csv), or a folder for NAME.csv of each split (default: the folder "
        "predictions beside the stage of the last run; with --experts or --released, predictions)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table; for IMAGE alone")
    ensemble = parser.add_argument_group("ensemble")
    ensemble.add_argument(
        "--experts", nargs="+", metavar="DIR", help="experts' folders (default: those of the last run)"
    )
    ensemble.add_argument("--released", metavar="DIR", help="folder of the authors' released experts")
    ensemble.add_argument(
        "--fusion",
        default="probability_mean",
        metavar="HOW",
        help="probability_mean, logit_mean, or the file that python -m featdistill fuse wrote",
    )
    ensemble.add_argument("--weights", metavar="A=2,B=1", help="weights of the experts (default: all equal)")
    ensemble.add_argument(
        "--tta", default="none", help=f"views of an image to average over: {', '.join(TTA)}, or some with +"
    )
    ensemble.add_argument(
        "--resize", choices=RESIZES, help="how images become inputs (default: as each expert was trained)"
    )
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch-size",
        default="auto",
        metavar="N",
        help=f"images a batch; auto: {DEFAULT_BATCH_SIZE} on a CPU, by the free memory on a GPU",
    )
    speed.add_argument(
        "--workers", type=int, help="loader processes (default: 8, or the cores that each process has)"
    )
    speed.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        help="arithmetic of the experts (default: bf16 on a GPU, fp32 on a CPU)",
    )
    speed.add_argument("--compile", action="store_true", help="compile the experts first; takes a minute")
    speed.add_argument("--device", help="cuda, cuda:1, cpu, ... (default: a GPU where there is one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    _check_input(arguments)
    process = Process.from_environment()
    is_table = bool(arguments.image) and arguments.out is None
    if arguments.json and not is_table:
        raise UserError("--json is for images given one by one, without --out")
    if is_table and not process.is_main:
        return 0
    predictor, folders = _build(arguments)
    sources = predictor.sources
    if is_table:
        found = single_images.score_images(predictor, prediction_jobs.images_by_path(arguments.image))
        print((single_images.as_json if arguments.json else single_images.as_table)(found, sources))
        return int(any("error" in image for image in found["images"]))
    if process.is_main:
        where = f"{predictor.device} in {predictor.precision}"
        where += f", {process.world} processes" if process.world > 1 else ""
        print(f"{len(sources)} experts on {where}: {', '.join(sources)}")
    jobs = _jobs(arguments, folders, process)
    return max(prediction_jobs.predict(predictor, job, process) for job in jobs)


def _check_input(arguments: Namespace) -> None:
    """Raise a `UserError` where nothing is asked for."""
    if arguments.image or arguments.split or arguments.manifest or arguments.images:
        return
    for path in arguments.experts or ():
        if Path(path).is_file():
            raise UserError(f"--experts takes folders, and {path} is a file; give images before --experts")
    raise UserError("nothing to score; give images, or --split, --manifest or --images (see --help)")


def _build(arguments: Namespace) -> tuple[Predictor, list[Path]]:
    """Return the ensemble, and the folders of those experts that are ours."""
    folders = [Path(folder) for folder in arguments.experts or ()]
    if not folders and not arguments.released:
        folders = latest_experts()
    flags = ("resize", "fusion", "weights", "tta", "device", "precision", "batch_size", "workers")
    settings = {flag: getattr(arguments, flag) for flag in flags}
    return load_ensemble(folders, arguments.released, compiled=arguments.compile, **settings), folders


def _jobs(arguments: Namespace, folders: list[Path], process: Process) -> list[Job]:
    """Return a job for each manifest that is asked for; images without one get it beside their scores."""
    by_hand = arguments.experts or arguments.released
    default_folder = Path("predictions") if by_hand else folders[0].parent.parent.parent / "predictions"
    out = Path(arguments.out or default_folder)
    is_file = out.suffix == ".csv"
    if arguments.images or arguments.image:
        images = Path(arguments.images).resolve() if arguments.images else None
        out = out if is_file else out / f"{images.name if images else 'images'}.csv"
        rows = prediction_jobs.images_of_folder(Path(arguments.images)) if images else None
        rows = prediction_jobs.images_by_path(arguments.image) if rows is None else rows
        return [Job(prediction_jobs.manifest_beside(rows, out, process), out)]
    if arguments.manifest:
        manifests = [Path(manifest) for manifest in arguments.manifest]
    elif arguments.data or folders:
        data = Path(arguments.data) if arguments.data else prediction_jobs.data_folder(folders[0])
        manifests = prediction_jobs.split_manifests(arguments.split, data)
    else:
        raise UserError("the released experts do not say where the splits are; give --data DIR or --manifest")
    if is_file and len(manifests) > 1:
        raise UserError("--out names one file, but several splits are asked for; name a folder")
    return [Job(path, out if is_file else out / f"{path.stem}.csv") for path in manifests]


if __name__ == "__main__":
    command_line.run(main)
