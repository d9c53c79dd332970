"""How many images a second experts score: batches that lie on the device, and JPEG files."""

import math
import time
from collections.abc import Sequence
from contextlib import closing

import pandas as pd
import torch
from torch import nn

from benchmarks.device import step_s_within
from featdistill.data.loading import ScoreDataset
from featdistill.inference.compute import attention_kernels
from featdistill.inference.scoring import score_dataset


def model_only_per_s(
    models: Sequence[nn.Module], batch_size: int, device: torch.device, seconds: float
) -> float:
    """Return images a second of uint8 batches on the device, through all models one after the other."""
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
    at_most_per_s: float,
) -> float:
    """Return images a second from files, by the engine in full swing.

    The clock starts when each worker has given a batch, and stops while two batches a worker are still under
    way, as they are at any time: no image counts that was decoded outside of the measured time.

    Args:
        at_most_per_s: what no loader could make faster; it decides how many rows there are.
    """
    warmup, ahead = max(1, workers), 2 * workers
    counted = max(1, math.ceil(1.5 * seconds * at_most_per_s / batch_size))
    total = (warmup + counted + ahead) * batch_size
    images = [paths[place % len(paths)] for place in range(total)]
    keys = [model.preprocessing.key for model in models]
    dataset = ScoreDataset(pd.DataFrame({"image": images, "name": images}), keys)
    settings = {"device": device, "batch_size": batch_size, "workers": workers}
    done, took = 0, 0.0
    with closing(score_dataset(models, dataset, **settings)) as batches:
        for _ in range(warmup):
            next(batches)
        start = time.perf_counter()
        for _ in range(counted):
            done += len(next(batches).rows)
            took = time.perf_counter() - start
            if took >= seconds:
                break
    return done / took
