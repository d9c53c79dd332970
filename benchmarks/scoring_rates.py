"""Speed of scoring: preparing images, experts on batches that are on the device, and files end to end."""

import math
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import cycle, islice

import numpy as np
import pandas as pd
import torch
from torch import nn

from benchmarks.device import step_s_within
from benchmarks.released_ensemble import PillowInput, pillow_tensors
from benchmarks.timing import thread_s
from featdistill.data.loading import ScoreDataset
from featdistill.data.preprocessing import prepare
from featdistill.images.reading import read_image
from featdistill.inference.compute import attention_kernels
from featdistill.inference.scoring import score_dataset
from featdistill.process_setup import one_thread

# The inputs of the paper's experts; how they are normalized makes no difference to the time.
INPUTS = tuple(PillowInput(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) for size in (224, 384))


def measure_preparation(paths: Sequence[str], seconds: float) -> dict[str, float]:
    """Time the preparation of images for all of `INPUTS` in one thread: ours to uint8, Pillow's to float32.

    Returns:
        `ours_ms` and `pillow_ms`, medians of the processor time per image, and `ratio`, the median of the
        ratios of the two times of an image, which are measured one after the other.
    """

    def ours(path: str) -> None:
        image = read_image(path)
        for one in INPUTS:
            prepare(image, one.size, "shorter")

    def pillow(path: str) -> None:
        pillow_tensors(path, INPUTS)

    threads = torch.get_num_threads()
    one_thread()
    ours(paths[0])
    pillow(paths[0])
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        path = paths[len(times) % len(paths)]
        times.append([thread_s(lambda way=way, path=path: way(path)) for way in (ours, pillow)])
    torch.set_num_threads(threads)
    ours_s, pillow_s = np.array(times).T
    figures = (1000 * ours_s, 1000 * pillow_s, pillow_s / ours_s)
    medians = (float(np.median(values)) for values in figures)
    return dict(zip(("ours_ms", "pillow_ms", "ratio"), medians, strict=True))


def model_only_per_s(
    models: Sequence[nn.Module], batch_size: int, device: torch.device, seconds: float
) -> float:
    """Return images per second of all models, one after the other, on uint8 batches on the device."""
    pixels = {
        key: torch.randint(0, 256, (batch_size, 3, key[0], key[0]), dtype=torch.uint8, device=device)
        for key in {model.preprocessing.key for model in models}
    }

    def step() -> None:
        with torch.inference_mode(), attention_kernels(device):
            for model in models:
                model(pixels[model.preprocessing.key])

    return batch_size / step_s_within(step, device, seconds)


def from_files_per_s(
    models: Sequence[nn.Module],
    paths: Sequence[str],
    batch_size: int,
    device: torch.device,
    seconds: float,
    *,
    workers: int,
    max_per_s: float,
    kind: type[ScoreDataset] = ScoreDataset,
) -> float:
    """Return images per second from files, by the inference engine once it has started.

    The clock starts when each worker has delivered a batch, and stops while two batches per worker are still
    in preparation, as they always are: no image is counted that was decoded outside the measured time.

    Args:
        max_per_s: what no loader could exceed; it decides how many rows there are.
        kind: of the data set, which decides where JPEGs are decoded.
    """
    warmup, ahead = max(1, workers), 2 * workers
    counted = max(1, math.ceil(1.5 * seconds * max_per_s / batch_size))
    images = list(islice(cycle(paths), (warmup + counted + ahead) * batch_size))
    rows = pd.DataFrame({"image": images, "name": images})
    dataset = kind(rows, [model.preprocessing.key for model in models])
    settings = {"device": device, "batch_size": batch_size, "workers": workers}
    done, spent_s = 0, 0.0
    with closing(score_dataset(models, dataset, **settings)) as batches:
        for _ in range(warmup):
            next(batches)
        start = time.perf_counter()
        for _ in range(counted):
            done += len(next(batches).rows)
            spent_s = time.perf_counter() - start
            if spent_s >= seconds:
                break
    return done / spent_s
