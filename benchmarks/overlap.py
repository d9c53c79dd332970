"""Whether decoding and scoring go on at the same time: the time of each alone, and of both together.

All three take the same images, batches, threads and worker processes, from the first call to the last result,
the start of the workers included. They are measured in turns that begin with another one each time. If the
two overlapped wholly, both together would take as long as the slower of them.

On a machine that runs other programs these times mean little. How many cores others kept busy is measured
beside them (from /proc/stat, where there is one), and the processor times of the main process and of the
workers, which other programs change less: the larger of the two is what both together would take on cores of
their own if neither ever waited for the other.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from benchmarks.device import synchronise
from featdistill.data.loading import make_loader
from featdistill.inference.compute import attention_kernels
from featdistill.inference.scoring import score_dataset

PARTS = ("decode", "model", "both")
_PROCESSOR = ("main_s", "workers_s")
_RATIOS = {
    "ratio": "end to end / slower part",
    "without_overlap": "the same without any overlap",
    "processor_ratio": "the same by processor times",
}


def measure_overlap(
    models: Sequence[nn.Module],
    dataset: Dataset,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    turns: int,
) -> dict:
    """Measure the three parts in turns.

    Args:
        models: experts in evaluation mode, on the device.
        dataset: a `ScoreDataset` for them, of a whole number of batches.

    Returns:
        `turns`: for each turn and part `wall_s`, the processor times `main_s` and `workers_s`, and
        `others_cores`, the cores that other programs kept busy meanwhile (None where that is not to be had);
        `ratio` of a turn is both / max(decode, model), `without_overlap` (decode + model) / max of them, and
        `processor_ratio` the larger processor time of both together by the larger of the parts alone.
    """
    batches = len(dataset) // batch_size
    parts = [range(n * batch_size, (n + 1) * batch_size) for n in range(batches)]
    pixels = {
        key: torch.randint(0, 256, (batch_size, 3, key[0], key[0]), dtype=torch.uint8, device=device)
        for key in {model.preprocessing.key for model in models}
    }

    def decode() -> None:
        for _ in make_loader(dataset, parts, workers):
            pass

    def model() -> None:
        for _ in range(batches):
            with torch.inference_mode(), attention_kernels(device):
                for one in models:
                    one(pixels[one.preprocessing.key])
        synchronise(device)

    def both() -> None:
        for _ in score_dataset(models, dataset, device=device, batch_size=batch_size, workers=workers):
            pass

    functions = dict(zip(PARTS, (decode, model, both), strict=True))
    model()
    found = []
    for turn in range(turns):
        order = PARTS[turn % 3 :] + PARTS[: turn % 3]
        figures: dict = {part: timed(functions[part]) for part in order}
        alone = [figures[part]["wall_s"] for part in ("decode", "model")]
        figures["ratio"] = figures["both"]["wall_s"] / max(alone)
        figures["without_overlap"] = sum(alone) / max(alone)
        larger = {part: max(figures[part]["main_s"], figures[part]["workers_s"]) for part in PARTS}
        figures["processor_ratio"] = larger["both"] / max(larger["decode"], larger["model"])
        found.append(figures)
    return {"images": len(dataset), "batch_size": batch_size, "workers": workers, "turns": found}


def timed(call: Callable[[], None]) -> dict[str, float | None]:
    """Return `wall_s`, `main_s`, `workers_s` and `others_cores` of a call; see `measure_overlap`."""
    before, own, start = _busy_s(), os.times(), time.perf_counter()
    call()
    wall_s, now = time.perf_counter() - start, os.times()
    main_s = now.user + now.system - own.user - own.system
    # Workers count when they have ended, which they have when the last batch was taken from their loader.
    workers_s = now.children_user + now.children_system - own.children_user - own.children_system
    others = None if before is None else max(0.0, _busy_s() - before - main_s - workers_s) / wall_s
    return {"wall_s": wall_s, "main_s": main_s, "workers_s": workers_s, "others_cores": others}


def print_overlap(report: dict) -> None:
    """Print a table of medians and least times, and the ratio."""
    turns = report["turns"]
    print(
        f"\noverlap: {report['images']} images in batches of {report['batch_size']}, {report['workers']} "
        f"workers, {len(turns)} turns"
    )
    titles = f"{'main: processor s':>19}{'workers: processor s':>22}{'cores of others':>17}"
    print(f"{'':24}{'median s':>10}{'least s':>10}{titles}")
    for part, title in zip(PARTS, ("decode alone", "model alone", "end to end"), strict=True):
        wall = [turn[part]["wall_s"] for turn in turns]
        main_s, workers_s = (statistics.median(turn[part][key] for turn in turns) for key in _PROCESSOR)
        others = [turn[part]["others_cores"] for turn in turns]
        shown = "-" if None in others else f"{statistics.median(others):.2f}"
        print(
            f"{title:24}{statistics.median(wall):10.2f}{min(wall):10.2f}{main_s:19.2f}{workers_s:22.2f}{shown:>17}"
        )
    for key, title in _RATIOS.items():
        ratios = [turn[key] for turn in turns]
        print(f"{title}: median {statistics.median(ratios):.3f}, least {min(ratios):.3f}")


def _busy_s() -> float | None:
    """Return the seconds that all cores together have been busy since the machine's start."""
    table = Path("/proc/stat")
    if not table.is_file():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, table.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
