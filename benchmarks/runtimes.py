"""Images per second of experts as graphs, next to PyTorch, on a CPU: `benchmarks/inference.py --runtimes`.

All ways to compute an expert take turns on the same batches, so that whatever else the machine does slows all
of them down alike; ratios are medians over the turns.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from featdistill.export import formats, tracing
from featdistill.inference import compute
from featdistill.inference.fusion import Fusion
from featdistill.models.expert import Expert
from featdistill.runtimes.exported import GRAPH_FILES
from featdistill.runtimes.graph import Graph, openvino_settings

EAGER = "pytorch fp32"
_MIN_TURNS = 5
# How weights are stored, and OpenVINO's settings.
_WAYS = {
    "fp32": ("fp32", openvino_settings()),
    "bf16": ("fp32", openvino_settings("bf16")),
    "int8": ("int8", openvino_settings(group=formats.GROUP)),
    "int8_weights": ("int8_weights", openvino_settings()),
}


def measure_runtimes(
    experts: Sequence[tuple[str, Expert]], runtimes: Sequence[str], batch_sizes: Sequence[int], seconds: float
) -> list[dict]:
    """Measure and print a row per expert, batch size and way to compute it.

    Args:
        experts: in evaluation mode, on the CPU, each with its title.
        seconds: measuring time per figure.

    Returns:
        Rows with `expert`, `batch_size`, `way`, `per_s`, and `ratio` to PyTorch in float32.
    """
    rows = []
    for title, expert in experts:
        with tempfile.TemporaryDirectory() as folder:
            ways = _ways(expert, runtimes, Path(folder))
            for batch_size in batch_sizes:
                times = _take_turns(ways, expert.preprocessing.size, batch_size, seconds)
                print(f"\n{title}, batch {batch_size}")
                for way, spent in times.items():
                    ratios = [eager / own for eager, own in zip(times[EAGER], spent, strict=True)]
                    per_s, ratio = batch_size / statistics.median(spent), statistics.median(ratios)
                    print(f"  {way:26} {per_s:7.2f} images/s, {ratio:.2f} times PyTorch in fp32", flush=True)
                    row = {"expert": title, "batch_size": batch_size, "way": way}
                    rows.append(row | {"per_s": per_s, "ratio": ratio})
    return rows


def _ways(expert: Expert, runtimes: Sequence[str], folder: Path) -> dict[str, Callable[[np.ndarray], object]]:
    """Return functions of (N, 3, S, S) uint8 that compute an expert, by title."""
    half = compute.cast(copy.deepcopy(expert), "bf16")
    ways = {EAGER: _eager(expert), "pytorch bf16": _eager(half)}
    traced = folder / "traced.onnx"
    tracing.write_onnx({"expert": expert}, Fusion(), traced)
    modules = tracing.block_modules({"expert": expert})
    for graph_format, (runtime, file) in GRAPH_FILES.items():
        if runtime not in runtimes:
            continue
        for way, (stored, settings) in _WAYS.items():
            if runtime != "openvino" and way == "bf16":
                continue
            place = folder / f"{runtime}-{way}"
            place.mkdir()
            formats.write_files(traced, place, graph_format, stored, modules)
            ways[f"{runtime} {way}"] = Graph(place / file, runtime, settings=settings)
    return ways


def _eager(expert: Expert) -> Callable[[np.ndarray], object]:
    def run(pixels: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            return expert(torch.from_numpy(pixels))

    return run


def _take_turns(
    ways: dict[str, Callable[[np.ndarray], object]], size: int, batch_size: int, seconds: float
) -> dict[str, list[float]]:
    """Return the seconds of each turn by title; the first turn, which warms up, is left out."""
    pixels = np.random.default_rng(1).integers(0, 256, (batch_size, 3, size, size), np.uint8)
    times: dict[str, list[float]] = {way: [] for way in ways}
    start = time.perf_counter()
    while len(times[EAGER]) <= _MIN_TURNS or time.perf_counter() - start < seconds * len(ways):
        for way, run in ways.items():
            begun = time.perf_counter()
            run(pixels)
            times[way].append(time.perf_counter() - begun)
    return {way: spent[1:] for way, spent in times.items()}
