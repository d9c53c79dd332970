"""Whether decoding and scoring overlap: the time of each alone, and of both together.

All three process the same images with the same batches, threads and worker processes, from the first call to
the last result, including the start of the workers. They are measured in turns that start with a different
one each time. If decoding and scoring overlapped fully, both together would take as long as the slower one.

On a machine that runs other programs these times mean little. Therefore the cores that other programs keep
busy are measured too, and the processor times of the main process and of the workers, which other programs
change less: the larger of the two is what both together would take on cores of their own if neither ever
waited for the other.
"""

import os
import time
from collections.abc import Callable, Sequence

import pandas as pd
import psutil
import torch
from torch import nn

from benchmarks.device import synchronize
from benchmarks.scenes import print_table
from benchmarks.scoring_rates import model_step, score_data
from featdistill.data.loading import make_loader
from featdistill.inference.scoring import score_dataset

PARTS = ("decode", "model", "both")


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
    """Measure the three parts in turns, and print the medians.

    Returns:
        `times`: a row per turn and part with `wall_s`, the processor times `main_s` and `workers_s`, and
        `other_cores`, the number of cores that other programs kept busy meanwhile. `ratios`: a row per turn,
        of the time of both together to that of the slower part alone.
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
    orders = [PARTS[turn % 3 :] + PARTS[: turn % 3] for turn in range(turns)]
    times = pd.DataFrame(
        {"turn": turn, "part": part, **timed(functions[part])}
        for turn, order in enumerate(orders)
        for part in order
    )
    wall = times.pivot(index="turn", columns="part", values="wall_s")
    larger = times.assign(s=times[["main_s", "workers_s"]].max(axis=1)).pivot(
        index="turn", columns="part", values="s"
    )
    slower = wall[["decode", "model"]].max(axis=1)
    ratios = pd.DataFrame(
        {
            "both / slower part": wall["both"] / slower,
            "the same without any overlap": (wall["decode"] + wall["model"]) / slower,
            "the same by processor times": larger["both"] / larger[["decode", "model"]].max(axis=1),
        }
    )
    print(f"\noverlap: {len(dataset)} images in batches of {batch_size}, {workers} workers, {turns} turns")
    columns = times.drop(columns="turn").groupby("part")
    print_table("medians in s", columns.median().assign(min_wall_s=columns["wall_s"].min()).reset_index())
    print_table("ratios", ratios.agg(["median", "min"]).T.reset_index())
    return {"times": times.to_dict("records"), "ratios": ratios.to_dict("records")}


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


def _busy_s() -> float:
    """Return how many seconds all cores together have been busy since the machine started."""
    times = psutil.cpu_times()
    return times.user + times.system + getattr(times, "nice", 0.0)
