"""Images per second of an ensemble, from JPEG files and of the experts alone, next to the authors' release.

On a GPU, this prints the whole table of the paper's four experts, with random weights:

    python benchmarks/inference.py --precisions fp32 bf16 fp16 fp8 --compile --out inference.json

It takes long, since experts are compiled for every batch size and precision. `--precisions bf16 --compile
--batch-sizes 128` is what an ensemble does in use; a lower `--seconds` makes each figure less exact.

    python benchmarks/inference.py --experts runs/paper/stage2/*/expert --images photos         your own
    python benchmarks/inference.py --backbones tiny_clip tiny_siglip --seconds 2                on a CPU
    python benchmarks/inference.py --backbones tiny_clip tiny_siglip --overlap \\
        --threads 1 --workers 1 --batch-sizes 32                                           on two cores

Without `--images`, synthetic scenes are written as JPEGs of 0.66 megapixels (quality 90, 4:2:0). They are in
the system's cache: no disk is measured.

Three tables are printed. *Preparation*: the time of one image in one thread, from the file to the uint8
inputs of 224 and 384 px, next to Pillow and float tensors. *Speed*: each expert and the ensemble, by
precision and batch size. `model only` is for uint8 batches that are on the device. `from files` starts when
each worker process has delivered a batch and ends with as many batches in preparation as at the start. The
share is of the rate of large matrix products, measured here in the same precision (for fp8 in bf16); the peak
is of tensors, including the weights. *Against the release*: the same ensemble as `released_ensemble.py` runs
it, with batches of 1, its default, and 128.

`--overlap` measures instead whether decoding and scoring overlap; see `overlap.py`.
"""

import copy
import gc
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
from benchmarks.overlap import measure_overlap, print_overlap
from benchmarks.released_ensemble import ReleasedEnsemble
from benchmarks.scenes import find_images, make_jpegs, read_scenes
from benchmarks.scoring_rates import INPUTS, from_files_per_s, measure_preparation, model_only_per_s
from featdistill import command_line
from featdistill.atomic import write_json
from featdistill.command_line import Parser, UserError
from featdistill.inference.compute import PRECISIONS, automatic_batch_size, cast, compile_experts
from featdistill.inference.float8 import require_float8, with_float8
from featdistill.models.expert import Expert, create_expert, load_expert

ENSEMBLE = "ensemble"
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
        help="or new experts on these backbones, with random weights",
    )
    parser.add_argument("--input-size", type=int, help="of --backbones, in px; default: each backbone's own")
    parser.add_argument("--images", metavar="DIR", help="JPEGs to score; default: synthetic scenes")
    parser.add_argument("--megapixels", type=float, default=0.66, help="of the synthetic scenes")
    parser.add_argument("--count", type=int, default=64, help="number of different images")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32, 128], metavar="N")
    parser.add_argument(
        "--precisions", nargs="+", choices=tuple(PRECISIONS), help="default: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--compile", action="store_true", help="also measure compiled experts")
    parser.add_argument("--workers", type=int, help="loader processes (default: one per core, at most 8)")
    parser.add_argument(
        "--threads", type=int, help="PyTorch's threads in the main process (default: its own choice)"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--seconds", type=float, default=10, help="measuring time per figure")
    parser.add_argument("--overlap", action="store_true", help="measure only the overlap")
    parser.add_argument(
        "--batches", type=int, default=40, help="batches of --overlap, of the first batch size"
    )
    parser.add_argument("--turns", type=int, default=7, help="measurements of --overlap")
    parser.add_argument("--out", metavar="FILE", help="save the figures as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    device, title = find_device(arguments.device)
    _check(arguments, device)
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
    with tempfile.TemporaryDirectory() as folder:
        paths = _images(arguments, folder)
        if arguments.overlap:
            models = [cast(expert, arguments.precisions[0]).to(device) for _, expert in experts]
            settings = {key: getattr(arguments, key) for key in ("batches", "workers", "turns")}
            batch_size = arguments.batch_sizes[0]
            overlap = measure_overlap(models, paths, batch_size=batch_size, device=device, **settings)
            report["overlap"] = overlap
            print_overlap(overlap)
        else:
            prepared = report["preparation"] = measure_preparation(paths, arguments.seconds)
            print(
                f"\npreparing an image for {INPUTS[0].size} and {INPUTS[1].size} px in one thread: "
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
    """Measure and print a row per precision, compiled or not, batch size, and expert or ensemble."""
    print(
        f"\n{'precision':16}{'batch':>6}  {'expert':24}{'from files/s':>13}{'model only/s':>13}"
        f"{'of matrix rate':>15}{'peak GiB':>9}"
    )
    flops = [forward_flops(expert.spec) for _, expert in experts]
    labels = [label for label, _ in experts]
    # Experts of one kind are equally fast.
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
        print(f"# {precision}: {products}; default batch size: {default}")
        for compiled in (False, True) if arguments.compile else (False,):
            for batch_size in arguments.batch_sizes:
                models = ready
                if compiled:
                    # Only so many variants of a function are compiled before PyTorch gives up silently.
                    torch._dynamo.reset()
                    models = compile_experts(ready, batch_size, device)
                for name, indices in units.items():
                    row = {"precision": precision, "compiled": compiled, "batch_size": batch_size}
                    row |= {"default_batch_size": default, "expert": name}
                    chosen = [models[index] for index in indices]
                    row |= _speed(chosen, paths, batch_size, device, arguments)
                    done_per_s = row["model_only_per_s"] * sum(flops[index] for index in indices)
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
    """Return `model_only_per_s`, `from_files_per_s` and `peak_gib`, without the weights of other models."""
    reset_peak(device)
    weights_gib = sum(value.nbytes for model in models for value in model.state_dict().values()) / GIB
    seconds, workers = arguments.seconds, arguments.workers
    start_gib = peak_gib(device)
    model_only = model_only_per_s(models, batch_size, device, seconds)
    settings = {"workers": workers, "max_per_s": model_only}
    from_files = from_files_per_s(models, paths, batch_size, device, seconds, **settings)
    peak = None if start_gib is None else peak_gib(device) - (start_gib - weights_gib)
    return {"from_files_per_s": from_files, "model_only_per_s": model_only, "peak_gib": peak}


def measure_release(
    experts: list[tuple[str, Expert]], paths: list[str], device: torch.device, seconds: float
) -> list[dict]:
    """Measure the ensemble as the release runs it, a row per batch size; see `_speed` for the figures."""
    plain = ReleasedEnsemble([expert for _, expert in experts], device)
    arithmetic = "fp32 weights, fp16 autocast" if device.type == "cuda" else "fp32"
    print(f"\nthe authors' release: {arithmetic}; {', '.join(plain.encoders)}")
    rows = []
    for batch_size in RELEASED_BATCH_SIZES:
        reset_peak(device)
        row: dict = {"precision": arithmetic, "compiled": False, "batch_size": batch_size}
        row |= {"expert": ENSEMBLE, "model_only_per_s": plain.model_only(batch_size, seconds)}
        row["from_files_per_s"] = plain.end_to_end(paths, batch_size, seconds)
        rows.append(row | {"peak_gib": peak_gib(device)})
        print(_line(rows[-1]), flush=True)
    return rows


def print_ratios(speed: list[dict], released: list[dict]) -> None:
    """Print how many times faster the ensemble is, at its fastest, than the release."""
    ours = [row for row in speed if row["expert"] == ENSEMBLE]
    print(f"\n{'ours against the release':36}{'its batch of 1':>16}{'its best batch':>16}")
    for title, ours_key, theirs_key in (
        ("from files / from files", "from_files_per_s", "from_files_per_s"),
        ("from files / model only", "from_files_per_s", "model_only_per_s"),
        ("model only / model only", "model_only_per_s", "model_only_per_s"),
    ):
        best = max(ours, key=lambda row: row[ours_key])
        cells = [released[0][theirs_key], max(row[theirs_key] for row in released)]
        print(
            f"{title:36}" + "".join(f"{best[ours_key] / rate:16.2f}" for rate in cells) + f"   {_title(best)}"
        )


def _line(row: dict) -> str:
    share, peak = row.get("share_of_matrix_rate"), row["peak_gib"]
    shown = "-" if share is None else f"{share:.1%}"
    return (
        f"{_title(row):24}{row['expert']:24}{row['from_files_per_s']:13.1f}{row['model_only_per_s']:13.1f}"
        f"{shown:>15}" + ("        -" if peak is None else f"{peak:9.2f}")
    )


def _title(row: dict) -> str:
    name = row["precision"] + (" compiled" if row["compiled"] else "")
    return f"{name:16}{row['batch_size']:6}"


def _check(arguments: Namespace, device: torch.device) -> None:
    """Fill in the defaults that depend on the machine; raise a `UserError` for an unusable value."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    arguments.workers = min(8, cores) if arguments.workers is None else arguments.workers
    arguments.precisions = arguments.precisions or ["bf16" if device.type == "cuda" else "fp32"]
    if arguments.workers < 0:
        raise UserError("--workers must be at least 0")
    numbers = [arguments.count, arguments.batches, arguments.turns, *arguments.batch_sizes]
    if min(*numbers, arguments.threads or 1) < 1 or min(arguments.seconds, arguments.megapixels) <= 0:
        raise UserError("counts must be 1 or more, --seconds and --megapixels above 0")
    if "fp16" in arguments.precisions and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; use --precisions fp32 bf16")
    if device.index:
        # The thread that pins batches in memory uses the current device.
        torch.cuda.set_device(device)
    if "fp8" in arguments.precisions:
        require_float8(device)


def _experts(arguments: Namespace) -> list[tuple[str, Expert]]:
    """Return experts in evaluation mode, each with the name of its backbone."""
    if arguments.experts:
        loaded = [load_expert(folder) for folder in arguments.experts]
        return [(f"{one.spec.name} at {one.spec.input_size}", one) for one in loaded]
    # Initializing a large network takes long, and two of a kind may as well have the same weights.
    size, names = arguments.input_size, arguments.backbones
    made = {name: create_expert(name, "random", input_size=size).eval() for name in dict.fromkeys(names)}
    return [(name, copy.deepcopy(made[name])) for name in names]


def _images(arguments: Namespace, folder: str) -> list[str]:
    """Return the paths of readable JPEGs: those of `--images`, or synthetic scenes written to a folder."""
    count = arguments.count
    if arguments.images:
        paths = find_images(arguments.images, count)
    else:
        paths = make_jpegs(folder, count, arguments.megapixels)
    sizes = [scene.size / 3 for scene in read_scenes(paths)]
    megapixels = sum(sizes) / len(sizes) / 1e6
    print(f"{len(paths)} different images, {megapixels:.2f} megapixels on average")
    return paths


if __name__ == "__main__":
    command_line.run(main)
