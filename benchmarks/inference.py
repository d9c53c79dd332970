"""Images per second of an ensemble, from JPEG files and of the experts alone, next to the authors' release.

On a GPU, this prints the whole table of the paper's four experts, with random weights:

    python benchmarks/inference.py --precisions fp32 bf16 fp16 fp8 --compile --out inference.json

    python benchmarks/inference.py --experts runs/paper/stage2/*/expert --images photos         your own
    python benchmarks/inference.py --backbones tiny_clip tiny_siglip --seconds 2                on a CPU
    python benchmarks/inference.py --runtimes onnxruntime openvino --backbones clip_b16         as graphs

Without `--images`, synthetic scenes are written as JPEGs of 0.66 megapixels (quality 90, 4:2:0). They are in
the system's cache: no disk is measured.

It measures the preparation of one image in one thread; then each expert and the ensemble, by precision and
batch size; then the same ensemble as `released_ensemble.py` runs it, with batches of 1, its default, and 128.
`Model only` is for uint8 batches on the device. The share is of the rate of large matrix products, measured
here in the same precision (for fp8 in bf16); the peak is of tensors, including the weights.
"""

import copy
import gc
import itertools
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

# As in predict.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.device import GIB, find_device, forward_flops, matrix_flops_per_s, peak_gib, reset_peak
from benchmarks.released_ensemble import ReleasedEnsemble
from benchmarks.runtimes import measure_runtimes
from benchmarks.scenes import jpegs, read_scenes
from benchmarks.scoring_rates import INPUTS, from_files_per_s, measure_preparation, model_only_per_s
from featdistill import command_line
from featdistill.atomic import write_json
from featdistill.command_line import Parser, within, worker_count
from featdistill.inference import compute
from featdistill.inference.float8 import require_float8, with_float8
from featdistill.inference.references import open_expert
from featdistill.models.expert import Expert, create_expert
from featdistill.runtimes.graph import RUNTIMES

ENSEMBLE = "ensemble"
PAPER = ["clip_l14", "clip_l14", "siglip_so400m", "siglip_so400m"]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
RELEASED_BATCH_SIZES = (1, 128)


def build_parser() -> Parser:
    parser = Parser(description="Speed and memory of scoring images with an ensemble.")
    ensemble = parser.add_mutually_exclusive_group()
    ensemble.add_argument("--experts", nargs="+", metavar="DIR", help="experts, as for predict.py")
    ensemble.add_argument(
        "--backbones", nargs="+", default=PAPER, metavar="NAME", help="or new experts, with random weights"
    )
    number = within(1)
    parser.add_argument(
        "--input-size", type=number, help="of --backbones, in px; default: the backbone's own"
    )
    parser.add_argument("--images", metavar="DIR", help="JPEGs to score; default: synthetic scenes")
    positive = within(0, kind=float, exclusive=True)
    parser.add_argument("--megapixels", type=positive, default=0.66, help="of the synthetic scenes")
    parser.add_argument("--count", type=number, default=64, help="number of different images")
    parser.add_argument("--batch-sizes", nargs="+", type=number, default=[1, 8, 32, 128], metavar="N")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=tuple(compute.PRECISIONS),
        help="default: bf16 on a GPU, fp32 on a CPU",
    )
    parser.add_argument("--compile", action="store_true", help="also measure compiled experts")
    parser.add_argument("--workers", type=worker_count(), default=min(8, CORES), help="loader processes")
    parser.add_argument("--threads", type=number, help="PyTorch's threads in the main process")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=RUNTIMES,
        metavar="NAME",
        help="measure the experts as graphs on the CPU instead, next to PyTorch: onnxruntime, openvino",
    )
    parser.add_argument("--seconds", type=positive, default=10, help="measuring time per figure")
    parser.add_argument("--out", metavar="FILE", help="save the figures as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    device, title = find_device("cpu" if arguments.runtimes else arguments.device)
    arguments.precisions = [compute.choose_precision(name, device) for name in arguments.precisions or [None]]
    arguments.variants = [False, True] if arguments.compile else [False]
    if "fp8" in arguments.precisions:
        require_float8(device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    experts = _experts(arguments)
    print(
        f"{title}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{arguments.workers} workers, {os.cpu_count()} cores"
    )
    report = {"device": title, "torch": torch.__version__, "workers": arguments.workers}
    report |= {"experts": [label for label, _ in experts]}
    if arguments.runtimes:
        sizes, seconds = arguments.batch_sizes, arguments.seconds
        report["runtimes"] = measure_runtimes(experts, arguments.runtimes, sizes, seconds)
        if arguments.out:
            write_json(arguments.out, report)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        paths = jpegs(arguments.images, arguments.count, folder, arguments.megapixels)
        pixels = [scene.size / 3 for scene in read_scenes(paths)]
        print(f"{len(paths)} different images, {sum(pixels) / len(pixels) / 1e6:.2f} megapixels on average")
        prepared = report["preparation"] = measure_preparation(paths, arguments.seconds)
        print(
            f"preparing an image for {INPUTS[0].size} and {INPUTS[1].size} px in one thread: "
            f"{prepared['ours_ms']:.2f} ms; with Pillow and float tensors {prepared['pillow_ms']:.2f} "
            f"ms; median ratio {prepared['ratio']:.2f}"
        )
        report["speed"] = measure_speed(experts, paths, device, arguments)
        gc.collect()
        report["release"] = measure_release(experts, paths, device, arguments.seconds)
        print_ratios(report["speed"], report["release"])
    if arguments.out:
        write_json(arguments.out, report)
    return 0


def measure_speed(
    experts: list[tuple[str, Expert]], paths: list[str], device: torch.device, arguments: Namespace
) -> list[dict]:
    """Measure and print a row per precision, compiled or not, batch size, and expert or ensemble.

    Args:
        arguments: `precisions`, `variants` (compiled or not), `batch_sizes`, `workers` and `seconds`.
    """
    flops = [forward_flops(expert.spec) for _, expert in experts]
    labels = [label for label, _ in experts]
    # Experts of one kind are equally fast.
    units = {label: [labels.index(label)] for label in labels} | {ENSEMBLE: list(range(len(labels)))}
    if len(labels) == 1:
        del units[labels[0]]
    rows = []
    for precision in arguments.precisions:
        rate = matrix_flops_per_s(device, compute.PRECISIONS[precision])
        ready = [compute.cast(copy.deepcopy(expert), precision).to(device) for _, expert in experts]
        ready = [with_float8(expert) for expert in ready] if precision == "fp8" else ready
        default = compute.automatic_batch_size(ready, device)
        print(f"\n{precision}: {rate / 1e12:.3g} TFLOP/s of matrix products; default batch size {default}")
        for compiled, batch_size in itertools.product(arguments.variants, arguments.batch_sizes):
            models = ready
            if compiled:
                # Only so many variants of a function are compiled before PyTorch gives up silently.
                torch._dynamo.reset()
                models = compute.compile_experts(ready, batch_size, device)
            for name, indices in units.items():
                row = {"precision": precision, "compiled": compiled, "batch_size": batch_size}
                row |= {"default_batch_size": default, "expert": name}
                row |= _speed([models[index] for index in indices], paths, batch_size, device, arguments)
                done_per_s = row["model_only_per_s"] * sum(flops[index] for index in indices)
                rows.append(row | {"share_of_matrix_rate": done_per_s / rate})
                _print_row(rows[-1])
        del ready, models
        gc.collect()
    return rows


def _speed(
    models: Sequence[nn.Module],
    paths: list[str],
    batch_size: int,
    device: torch.device,
    arguments: Namespace,
) -> dict[str, float | None]:
    """Return `model_only_per_s`, `from_files_per_s` and `peak_gib`, without the weights of other models."""
    reset_peak(device)
    weights_gib = sum(value.nbytes for model in models for value in model.state_dict().values()) / GIB
    seconds, start_gib = arguments.seconds, peak_gib(device)
    model_only = model_only_per_s(models, batch_size, device, seconds)
    settings = {"workers": arguments.workers, "max_per_s": model_only}
    from_files = from_files_per_s(models, paths, batch_size, device, seconds, **settings)
    peak = None if start_gib is None else peak_gib(device) - (start_gib - weights_gib)
    return {"from_files_per_s": from_files, "model_only_per_s": model_only, "peak_gib": peak}


def measure_release(
    experts: list[tuple[str, Expert]], paths: list[str], device: torch.device, seconds: float
) -> list[dict]:
    """Measure the ensemble as the release runs it, a row per batch size; see `_speed` for the figures."""
    release = ReleasedEnsemble([expert for _, expert in experts], device)
    precision = "fp32 weights, fp16 autocast" if device.type == "cuda" else "fp32"
    print(f"\nthe authors' release: {', '.join(release.encoders)}")
    rows = []
    for batch_size in RELEASED_BATCH_SIZES:
        reset_peak(device)
        row = {"precision": precision, "compiled": False, "batch_size": batch_size, "expert": ENSEMBLE}
        row["model_only_per_s"] = release.model_only(batch_size, seconds)
        row["from_files_per_s"] = release.end_to_end(paths, batch_size, seconds)
        rows.append(row | {"peak_gib": peak_gib(device)})
        _print_row(rows[-1])
    return rows


def _print_row(row: dict) -> None:
    share = f", {row['share_of_matrix_rate']:.1%} of the matrix rate" if "share_of_matrix_rate" in row else ""
    peak = "" if row["peak_gib"] is None else f", peak {row['peak_gib']:.2f} GiB"
    name = f"{row['precision']}{' compiled' * row['compiled']}, batch {row['batch_size']}, {row['expert']}"
    rates = f"{row['from_files_per_s']:.1f} images/s from files, {row['model_only_per_s']:.1f} model only"
    print(f"{name}: {rates}{share}{peak}", flush=True)


def print_ratios(speed: list[dict], release: list[dict]) -> None:
    """Print how many times faster the ensemble is, at its fastest, than the release."""
    print("\nours / the release, with its batch of 1 and its best batch")
    for ours, theirs in (("from_files",) * 2, ("from_files", "model_only"), ("model_only",) * 2):
        best = max(row[f"{ours}_per_s"] for row in speed if row["expert"] == ENSEMBLE)
        rates = [row[f"{theirs}_per_s"] for row in release]
        print(f"{ours} / {theirs}: {best / rates[0]:.2f}, {best / max(rates):.2f}")


def _experts(arguments: Namespace) -> list[tuple[str, Expert]]:
    """Return experts in evaluation mode, each with the name of its backbone."""
    if arguments.experts:
        loaded = [open_expert(folder).expert for folder in arguments.experts]
        return [(f"{one.spec.name} at {one.spec.input_size}", one) for one in loaded]
    # Initializing a large network takes long, and two of a kind may as well have the same weights.
    size, names = arguments.input_size, arguments.backbones
    made = {name: create_expert(name, "random", input_size=size).eval() for name in dict.fromkeys(names)}
    return [(name, copy.deepcopy(made[name])) for name in names]


if __name__ == "__main__":
    command_line.run(main)
