"""Images a second of an ensemble, from JPEG files and of the experts alone, beside the release's way.

On a GPU, the whole table of the paper's four experts, with random weights, is one command:

    python benchmarks/inference.py --precisions fp32 bf16 fp16 fp8 --compile --out inference.json

It takes long, since every batch size of every precision is compiled apart; what an ensemble does in use is
`--precisions bf16 --compile --batch-sizes 128`, and a lower `--seconds` makes each figure less exact.

    python benchmarks/inference.py --experts runs/paper/stage2/*/expert --images photos         your own
    python benchmarks/inference.py --backbones tiny_clip tiny_siglip --seconds 2                on a CPU
    python benchmarks/inference.py --backbones tiny_clip tiny_siglip --overlap \\
        --threads 1 --workers 1 --batch-sizes 32                                           on two cores

Without `--images`, synthetic scenes are written as JPEGs of 0.66 megapixels (quality 90, 4:2:0). They lie in
the system's cache: no disk is measured.

Three tables are printed. *Preparation*: what one image takes in one thread, from the file to the uint8 inputs
of 224 and 384 px, against Pillow and float tensors. *Speed*: for each expert and for the ensemble, by
precision and batch size. `model only` takes uint8 batches that lie on the device. `from files` is measured
in full swing: from the moment when each worker process has given a batch, and with as many batches under way
at the end as at the beginning. The share is that of the rate of large matrix products, measured here, in the
same precision (for fp8 in bf16); the peak is of tensors, the weights included. *Against the release's way*:
the same ensemble as `released_way.py` has it, at batch 1, its default, and at 128.

`--overlap` measures instead whether decoding and scoring go on at the same time; see `overlap.py`.
"""

import copy
import gc
import math
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

# As predict.py has it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pandas as pd
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.device import (
    GIB,
    forget_peak,
    matrix_flops_per_s,
    peak_gib,
    spec_flops,
)
from benchmarks.distortions import fitted, synthetic_scene
from benchmarks.loader import find_images
from benchmarks.overlap import measure_overlap, print_overlap
from benchmarks.preparation import measure_preparation, print_preparation
from benchmarks.released_way import ReleasedWay
from benchmarks.scoring_rates import from_files_per_s, model_only_per_s
from featdistill import command_line
from featdistill.atomic import write_json
from featdistill.command_line import Parser, UserError
from featdistill.data.loading import ScoreDataset
from featdistill.images.reading import BrokenImage, read_image
from featdistill.inference.compute import PRECISIONS, automatic_batch_size, cast, compile_experts
from featdistill.inference.float8 import require_float8, with_float8
from featdistill.models.expert import Expert, create_expert, load_expert

ENSEMBLE = "ensemble"
# Width by height of the synthetic scenes.
ASPECT = 4 / 3
RELEASED_BATCH_SIZES = (1, 128)


def build_parser() -> Parser:
    parser = Parser(description="Speed and memory of scoring images with an ensemble.")
    ensemble = parser.add_mutually_exclusive_group()
    ensemble.add_argument("--experts", nargs="+", metavar="DIR", help="experts' folders")
    ensemble.add_argument(
        "--backbones",
        nargs="+",
        default=["clip_l14", "clip_l14", "siglip_so400m", "siglip_so400m"],
        metavar="NAME",
        help="or new experts with random weights on these backbones",
    )
    parser.add_argument("--input-size", type=int, help="of --backbones, in px; default: each one's own")
    parser.add_argument("--images", metavar="DIR", help="JPEGs to score; default: synthetic scenes")
    parser.add_argument("--megapixels", type=float, default=0.66, help="of the synthetic scenes")
    parser.add_argument("--count", type=int, default=64, help="different images")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32, 128], metavar="N")
    parser.add_argument(
        "--precisions", nargs="+", choices=tuple(PRECISIONS), help="default: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--compile", action="store_true", help="measure compiled experts as well")
    parser.add_argument("--workers", type=int, help="loader processes (default: 8, or as many as cores)")
    parser.add_argument("--threads", type=int, help="of PyTorch in the main process (default: its own)")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--seconds", type=float, default=10, help="that a figure is measured for")
    parser.add_argument("--overlap", action="store_true", help="measure the overlap alone")
    parser.add_argument("--batches", type=int, default=40, help="of --overlap, of the first batch size")
    parser.add_argument("--turns", type=int, default=7, help="measurements of --overlap")
    parser.add_argument("--out", metavar="FILE", help="the figures as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check(arguments, device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    experts = _experts(arguments)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.workers} workers, "
        f"{os.cpu_count()} cores"
    )
    report = {"device": name, "torch": torch.__version__, "workers": arguments.workers}
    report |= {"experts": [label for label, _ in experts]}
    with tempfile.TemporaryDirectory() as folder:
        paths = _images(arguments, folder)
        if arguments.overlap:
            report["overlap"] = _overlap(experts, paths, device, arguments)
            print_overlap(report["overlap"])
        else:
            report["preparation"] = measure_preparation(paths, arguments.seconds)
            print_preparation(report["preparation"])
            report["speed"] = measure_speed(experts, paths, device, arguments)
            gc.collect()
            report["released_way"] = measure_released_way(experts, paths, device, arguments.seconds)
            print_ratios(report["speed"], report["released_way"])
    if arguments.out:
        write_json(arguments.out, report)
    return 0


def measure_speed(
    experts: list[tuple[str, Expert]], paths: list[str], device: torch.device, arguments: Namespace
) -> list[dict]:
    """Measure and print a row for each precision, way to run, batch size, and expert or ensemble."""
    print(
        f"\n{'precision':16}{'batch':>6}  {'expert':24}{'from files/s':>13}{'model only/s':>13}"
        f"{'of matrix rate':>15}{'peak GiB':>9}"
    )
    flops = [spec_flops(expert.spec) for _, expert in experts]
    labels = [label for label, _ in experts]
    # Experts of one kind are as fast as each other.
    units = {label: [labels.index(label)] for label in labels} | {ENSEMBLE: list(range(len(labels)))}
    if len(labels) == 1:
        del units[labels[0]]
    rows = []
    for precision in arguments.precisions:
        dtype = PRECISIONS[precision]
        rate = matrix_flops_per_s(device, dtype)
        ready = [cast(copy.deepcopy(expert), precision).to(device) for _, expert in experts]
        ready = [with_float8(expert) for expert in ready] if precision == "fp8" else ready
        default = automatic_batch_size(ready, device)
        products = f"{str(dtype).removeprefix('torch.')} products: {rate / 1e12:.3g} TFLOP/s"
        print(f"# {precision}: {products}; batch size by default: {default}")
        for compiled in (False, True) if arguments.compile else (False,):
            for batch_size in arguments.batch_sizes:
                models = ready
                if compiled:
                    # Only so many variants of a function are compiled before PyTorch gives up silently.
                    torch._dynamo.reset()
                    models = compile_experts(ready, batch_size, device)
                for name, places in units.items():
                    row = {"precision": precision, "compiled": compiled, "batch_size": batch_size}
                    row |= {"default_batch_size": default, "expert": name}
                    chosen = [models[place] for place in places]
                    row |= _speed(chosen, paths, batch_size, device, arguments)
                    done_per_s = row["model_only_per_s"] * sum(flops[place] for place in places)
                    row["share_of_matrix_rate"] = done_per_s / rate
                    rows.append(row)
                    print(_line(row), flush=True)
        del ready, models, chosen
        gc.collect()
    return rows


def _speed(
    models: Sequence[nn.Module],
    paths: list[str],
    batch_size: int,
    device: torch.device,
    arguments: Namespace,
) -> dict[str, float | None]:
    """Return `model_only_per_s`, `from_files_per_s` and `peak_gib`, of weights only these models' in it."""
    forget_peak(device)
    own = sum(value.nbytes for model in models for value in model.state_dict().values()) / GIB
    seconds, workers = arguments.seconds, arguments.workers
    held = peak_gib(device)
    model_only = model_only_per_s(models, batch_size, device, seconds)
    settings = {"workers": workers, "at_most_per_s": model_only}
    from_files = from_files_per_s(models, paths, batch_size, device, seconds, **settings)
    peak = None if held is None else peak_gib(device) - (held - own)
    return {"from_files_per_s": from_files, "model_only_per_s": model_only, "peak_gib": peak}


def measure_released_way(
    experts: list[tuple[str, Expert]], paths: list[str], device: torch.device, seconds: float
) -> list[dict]:
    """Return `from_files_per_s`, `model_only_per_s` and `peak_gib` of the release's way by batch size."""
    plain = ReleasedWay([expert for _, expert in experts], device)
    arithmetic = "fp32 weights, fp16 autocast" if device.type == "cuda" else "fp32"
    print(f"\nthe release's way: {arithmetic}; {', '.join(plain.towers)}")
    rows = []
    for batch_size in RELEASED_BATCH_SIZES:
        forget_peak(device)
        row: dict = {"precision": arithmetic, "compiled": False, "batch_size": batch_size}
        row |= {"expert": ENSEMBLE, "model_only_per_s": plain.model_only(batch_size, seconds)}
        row["from_files_per_s"] = plain.end_to_end(paths, batch_size, seconds)
        rows.append(row | {"peak_gib": peak_gib(device)})
        print(_line(rows[-1]), flush=True)
    return rows


def print_ratios(speed: list[dict], released: list[dict]) -> None:
    """Print how many times faster the ensemble is, at its fastest, than the release's way."""
    ours = [row for row in speed if row["expert"] == ENSEMBLE]
    print(f"\n{'ours against the release':36}{'its batch of 1':>16}{'its best batch':>16}")
    for title, own, theirs in (
        ("from files / from files", "from_files_per_s", "from_files_per_s"),
        ("from files / model only", "from_files_per_s", "model_only_per_s"),
        ("model only / model only", "model_only_per_s", "model_only_per_s"),
    ):
        best = max(ours, key=lambda row: row[own])
        cells = [released[0][theirs], max(row[theirs] for row in released)]
        print(f"{title:36}" + "".join(f"{best[own] / rate:16.2f}" for rate in cells) + f"   {_way(best)}")


def _line(row: dict) -> str:
    share, peak = row.get("share_of_matrix_rate"), row["peak_gib"]
    shown = "-" if share is None else f"{share:.1%}"
    return (
        f"{_way(row):24}{row['expert']:24}{row['from_files_per_s']:13.1f}{row['model_only_per_s']:13.1f}"
        f"{shown:>15}" + ("        -" if peak is None else f"{peak:9.2f}")
    )


def _way(row: dict) -> str:
    name = row["precision"] + (" compiled" if row["compiled"] else "")
    return f"{name:16}{row['batch_size']:6}"


def _overlap(
    experts: list[tuple[str, Expert]], paths: list[str], device: torch.device, arguments: Namespace
) -> dict:
    models = [cast(expert, arguments.precisions[0]).to(device) for _, expert in experts]
    batch_size = arguments.batch_sizes[0]
    images = [paths[place % len(paths)] for place in range(arguments.batches * batch_size)]
    rows = pd.DataFrame({"image": images, "name": images})
    dataset = ScoreDataset(rows, [model.preprocessing.key for model in models])
    settings = {"batch_size": batch_size, "workers": arguments.workers, "turns": arguments.turns}
    return measure_overlap(models, dataset, device=device, **settings)


def _check(arguments: Namespace, device: torch.device) -> None:
    """Fill in the defaults that depend on the machine; raise a `UserError` where a value does not do."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    arguments.workers = min(8, cores) if arguments.workers is None else arguments.workers
    arguments.precisions = arguments.precisions or ["bf16" if device.type == "cuda" else "fp32"]
    if arguments.workers < 0:
        raise UserError("--workers must be at least 0")
    numbers = [arguments.count, arguments.batches, arguments.turns, *arguments.batch_sizes]
    if min(*numbers, arguments.threads or 1) < 1 or min(arguments.seconds, arguments.megapixels) <= 0:
        raise UserError("counts must be 1 or more, --seconds and --megapixels above 0")
    if "fp16" in arguments.precisions and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; give --precisions fp32 bf16")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"there is no GPU {device}; give --device cpu")
    if device.index:
        # The thread that page-locks batches goes by the current device.
        torch.cuda.set_device(device)
    if "fp8" in arguments.precisions:
        require_float8(device)


def _experts(arguments: Namespace) -> list[tuple[str, Expert]]:
    """Return experts in evaluation mode, each with the name of its backbone."""
    if arguments.experts:
        loaded = [load_expert(folder) for folder in arguments.experts]
        return [(f"{one.spec.name} at {one.spec.input_size}", one) for one in loaded]
    # Drawing the weights of a large one takes long, and two of a kind may as well have the same.
    size, names = arguments.input_size, arguments.backbones
    made = {name: create_expert(name, "random", input_size=size).eval() for name in dict.fromkeys(names)}
    return [(name, copy.deepcopy(made[name])) for name in names]


def _images(arguments: Namespace, folder: str) -> list[str]:
    """Return the paths of JPEGs that can be read: those given, or synthetic scenes written to a folder."""
    if arguments.images:
        paths = find_images(arguments.images, arguments.count)
    else:
        height = round(math.sqrt(arguments.megapixels * 1e6 / ASPECT))
        paths = [str(Path(folder) / f"{seed:04d}.jpg") for seed in range(arguments.count)]
        for seed, path in enumerate(paths):
            scene = fitted([synthetic_scene(seed)], (round(height * ASPECT), height))[0]
            Image.fromarray(scene).save(path, quality=90)
    try:
        shapes = [read_image(path).shape for path in paths]
    except BrokenImage as error:
        raise UserError(f"--images {arguments.images}: {error}") from error
    megapixels = sum(height * width for height, width, _ in shapes) / len(shapes) / 1e6
    print(f"{len(paths)} different images, {megapixels:.2f} megapixels in the mean")
    return paths


if __name__ == "__main__":
    command_line.run(main)
