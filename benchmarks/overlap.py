"""Whether decoding and scoring overlap: the time of each alone, and of both together.

All three process the same images with the same batches, threads and worker processes, from the first call to
the last result, including the start of the workers. They are measured in turns that start with a different
one each time. If decoding and scoring overlapped fully, both together would take as long as the slower one.

On a machine that runs other programs these times mean little. Therefore the cores that other programs keep
busy are measured too, and the processor times of the main process and of
the workers, which other programs change less: the larger of the two is what both together would take on cores
of their own if neither ever waited for the other.
"""

import os
import time
from collections.abc import Callable, Sequence

import pandas as pd
import psutil
import torch
from torch import nn

from benchmarks.device import synchronize
from benchmarks.scoring_rates import model_step, score_data
from featdistill.data.loading import make_loader
from featdistill.inference.scoring import score_dataset

PARTS = ("decode", "model", "both")
_RATIOS = {
    "ratio": "both / slower part",
    "without_overlap": "the same without any overlap",
    "processor_ratio": "the same by processor times",
}


def measure_overlap(
    models: Sequence[nn.Module],
    paths: Sequence[str],
    *,
    batches: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    turns: int,
) -> dict:
    """Measure the three parts in turns.

    Returns:
        `times`: a row per turn and part with `wall_s`, the processor times `main_s` and `workers_s`, and
        `other_cores`, the number of cores that other programs kept busy meanwhile. `ratios`: a row per turn
        with `ratio`, both / max(decode, model), `without_overlap`, (decode + model) / max of them, and
        `processor_ratio`, the larger processor time of both together by the larger of the parts alone.
    """
    dataset = score_data(models, paths, batches * batch_size)
    rows_of_batches = [range(n * batch_size, (n + 1) * batch_size) for n in range(batches)]
    step = model_step(models, batch_size, device)

    def decode() -> None:
        for _ in make_loader(dataset, rows_of_batches, workers):
            pass

    def model() -> None:
        for _ in range(batches):
            step()
        synchronize(device)

    def both() -> None:
        for _ in score_dataset(models, dataset, device=device, batch_size=batch_size, workers=workers):
            pass

    functions = dict(zip(PARTS, (decode, model, both), strict=True))
    model()
    times, ratios = [], []
    for turn in range(turns):
        order = PARTS[turn % 3 :] + PARTS[: turn % 3]
        figures = {part: timed(functions[part]) for part in order}
        times += [{"turn": turn, "part": part} | figures[part] for part in PARTS]
        alone = [figures[part]["wall_s"] for part in ("decode", "model")]
        larger = {part: max(figures[part]["main_s"], figures[part]["workers_s"]) for part in PARTS}
        ratios.append(
            {
                "ratio": figures["both"]["wall_s"] / max(alone),
                "without_overlap": sum(alone) / max(alone),
                "processor_ratio": larger["both"] / max(larger["decode"], larger["model"]),
            }
        )
    settings = {"images": len(dataset), "batch_size": batch_size, "workers": workers}
    return settings | {"times": times, "ratios": ratios}


def timed(call: Callable[[], None]) -> dict[str, float]:
    """Return `wall_s`, `main_s`, `workers_s` and `other_cores` of a call; see `measure_overlap`."""
    busy_s, spent, start = _busy_s(), os.times(), time.perf_counter()
    call()
    wall_s, now = time.perf_counter() - start, os.times()
    main_s = now.user + now.system - spent.user - spent.system
    # Workers are counted once they have ended; they have when the last batch was taken from their loader.
    workers_s = now.children_user + now.children_system - spent.children_user - spent.children_system
    others = max(0.0, _busy_s() - busy_s - main_s - workers_s) / wall_s
    return {"wall_s": wall_s, "main_s": main_s, "workers_s": workers_s, "other_cores": others}


def print_overlap(report: dict) -> None:
    """Print a table of medians and minima, and the ratios."""
    times, ratios = pd.DataFrame(report["times"]), pd.DataFrame(report["ratios"])
    print(
        f"\noverlap: {report['images']} images in batches of {report['batch_size']}, {report['workers']} "
        f"workers, {len(ratios)} turns; medians"
    )
    parts = times.drop(columns="turn").groupby("part", sort=False)
    print(parts.median().assign(min_wall_s=parts["wall_s"].min()).round(2).to_string())
    for key, title in _RATIOS.items():
        print(f"{title}: median {ratios[key].median():.3f}, minimum {ratios[key].min():.3f}")


def _busy_s() -> float:
    """Return how many seconds all cores together have been busy since the machine started."""
    times = psutil.cpu_times()
    return times.user + times.system + getattr(times, "nice", 0.0)
