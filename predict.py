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

import dataclasses
import os
from argparse import Namespace
from pathlib import Path

# Read once, when PyTorch is loaded. Threads that wait would else keep a core busy that the workers need: on
# two cores that cost 30 % more CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from featdistill import command_line, prediction_jobs, single_images
from featdistill.command_line import Parser, UserError
from featdistill.experts import Expert, load_expert, read_card
from featdistill.fusion import Fusion, parse_fusion, parse_weights
from featdistill.precision import PRECISIONS
from featdistill.prediction_jobs import Job
from featdistill.predictor import Predictor
from featdistill.processes import Process
from featdistill.released_weights import read_released, released_hashes
from featdistill.run_folder import latest_experts
from featdistill.tta import TTA, parse_tta
from featdistill.tuning import DEFAULT_BATCH_SIZE

RESIZES = ("shorter", "squash", "crop")


def build_parser() -> Parser:
    parser = Parser(description="Score images with an ensemble of experts: P(AI-generated), averaged.")
    what = parser.add_mutually_exclusive_group(required=True)
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
        help="probability_mean, logit_mean, or the file that python -m featdistill.fusion_fit wrote",
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
    process = Process.from_environment()
    is_table = bool(arguments.image) and arguments.out is None
    if arguments.json and not is_table:
        raise UserError("--json is for images given one by one, without --out")
    if is_table and not process.is_main:
        return 0
    predictor, sources, folders = _build(arguments, process)
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


def _build(arguments: Namespace, process: Process) -> tuple[Predictor, dict[str, dict[str, str]], list[Path]]:
    """Return the ensemble, where each expert comes from, and the folders of those that are ours."""
    device = _device(arguments.device, process)
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; give --precision bf16 or fp32")
    batch_size = _batch_size(arguments.batch_size, device)
    views = parse_tta(arguments.tta)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(8, max(1, cores // process.local_world)) if arguments.workers is None else arguments.workers
    if workers < 0:
        raise UserError("--workers must be at least 0")
    fusion = parse_fusion(arguments.fusion)
    folders = [Path(folder) for folder in arguments.experts or ()]
    if not folders and not arguments.released:
        folders = latest_experts()
    experts, hashes, sources = _load(folders, arguments.released, arguments.resize)
    if arguments.weights:
        weights = parse_weights(arguments.weights, list(experts))
        fusion = Fusion(fusion.method, weights, fusion.temperature)
    predictor = Predictor(
        experts, hashes, fusion, device, precision, batch_size, workers, arguments.compile, *views
    )
    return predictor, sources, folders


def _load(
    folders: list[Path], released: str | None, resize: str | None
) -> tuple[dict[str, Expert], dict[str, str], dict[str, dict[str, str]]]:
    """Return experts, the hashes of their weights, and what each is and where it lies, all by name."""
    named = _names(folders)
    experts = {name: load_expert(folder) for name, folder in named.items()}
    hashes = {name: read_card(folder)["weights_sha256"] for name, folder in named.items()}
    places = {name: str(folder) for name, folder in named.items()}
    if released:
        theirs, their_hashes = read_released(released), released_hashes(released)
        for own, expert in theirs.items():
            name = _free_name(own, experts)
            experts[name], hashes[name] = expert, their_hashes[own]
            places[name] = f"{Path(released) / own}.pth"
    sources = {}
    for name, expert in experts.items():
        if resize:
            expert.preprocessing = dataclasses.replace(expert.preprocessing, resize=resize)
        fitted, spec = expert.preprocessing, expert.spec
        backbone = f"{spec.library}:{spec.name} at {fitted.size} px, {fitted.resize}"
        sources[name] = {"folder": places[name], "backbone": backbone}
    return experts, hashes, sources


def _device(asked: str | None, process: Process) -> torch.device:
    """Return the device; of several processes on a machine, each takes its own GPU."""
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {asked} is no device; give cuda, cuda:1 or cpu") from error
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if device.index is None:
        device = torch.device("cuda", process.local_rank % max(1, count))
    if device.index >= count:
        raise UserError(f"there is no GPU {device}: {count} are to be seen; give another --device")
    # The thread that page-locks batches goes by the current device.
    torch.cuda.set_device(device)
    return device


def _batch_size(asked: str, device: torch.device) -> int | None:
    if asked == "auto":
        return None if device.type == "cuda" else DEFAULT_BATCH_SIZE
    if not asked.isascii() or not asked.isdigit() or int(asked) < 1:
        raise UserError(f"--batch-size must be a number above 0 or auto, not {asked}")
    return int(asked)


def _names(folders: list[Path]) -> dict[str, Path]:
    """Name each expert after its run: `runs/x/stage2/clip_l14_a/expert` is `clip_l14_a`."""
    names: dict[str, Path] = {}
    for folder in folders:
        absolute = folder.resolve()
        name = absolute.parent.name if absolute.name in ("expert", "expert-last") else absolute.name
        names[_free_name(name, names)] = folder
    return names


def _free_name(name: str, taken: dict[str, object]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


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
