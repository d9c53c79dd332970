"""What the preparation of an image costs in one thread, against Pillow's way, image by image in turns."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.released_way import PillowInput, pillow_tensors
from benchmarks.timing import thread_s
from featdistill.data.preprocessing import prepare
from featdistill.images.reading import read_image
from featdistill.process_setup import one_thread

# What the paper's experts take; how they normalise makes no difference to the time.
INPUTS = tuple(PillowInput(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) for size in (224, 384))


def measure_preparation(paths: Sequence[str], seconds: float) -> dict[str, float]:
    """Time both ways from a file to all of `INPUTS`: ours to uint8, Pillow's to normalised float32.

    Returns:
        `ours_ms` and `pillow_ms`, medians of the processor time of an image, and `ratio`, the median of the
        ratios of the two times that an image took one after the other.
    """
    threads = torch.get_num_threads()
    one_thread(0)
    ours(paths[0])
    pillow_tensors(paths[0], INPUTS)
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        path = paths[len(times) % len(paths)]
        times.append([thread_s(lambda p=path: ours(p)), thread_s(lambda p=path: pillow_tensors(p, INPUTS))])
    torch.set_num_threads(threads)
    own, pillow = np.array(times).T
    middle = {"ours_ms": 1000 * np.median(own), "pillow_ms": 1000 * np.median(pillow)}
    return {key: float(value) for key, value in (middle | {"ratio": np.median(pillow / own)}).items()}


def ours(path: str) -> None:
    """Prepare an image as a worker of the engine does."""
    image = read_image(path)
    for one in INPUTS:
        prepare(image, one.size, "shorter")


def print_preparation(found: dict[str, float]) -> None:
    """Print a line of what `measure_preparation` found."""
    sizes = " and ".join(str(one.size) for one in INPUTS)
    print(
        f"\npreparation of an image for {sizes} px in one thread: {found['ours_ms']:.2f} ms; with Pillow and "
        f"float tensors {found['pillow_ms']:.2f} ms; median ratio {found['ratio']:.2f}"
    )
