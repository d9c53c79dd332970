"""How many images per second the training loader produces: decode, distort, resize, crop, stack to batches.

Every configuration (policy, input size, distortions at the native or at the input size) is measured on one
core in processor time, broken down into parts, and with worker processes in wall-clock time. The yardstick Y
is that of `distortions.py`: Pillow decodes 0.66 megapixels and resizes them to 384.

    python benchmarks/loader.py --images photos/ --out loader.json
    python benchmarks/loader.py --policies none official,max_operations=5 --sizes 224
"""

import argparse
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import cv2
import numpy as np
import pandas as pd
import PIL
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scenes import jpegs, print_table, read_scenes, synthetic_scene
from benchmarks.timing import Yardstick
from featdistill import command_line
from featdistill.atomic import write_json
from featdistill.command_line import Parser, within, worker_count
from featdistill.data import loading, train_dataset
from featdistill.data.loading import make_loader
from featdistill.data.preprocessing import Preprocessing
from featdistill.data.sampling import TrainBatches
from featdistill.data.train_dataset import TrainDataset
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import LEVELS
from featdistill.distortions.policy import DistortionPolicy
from featdistill.distortions.presets import parse_policy
from featdistill.recipe_groups import Augmentation

# By the name in the tables; anything else that `parse_policy` accepts can be measured as well.
POLICIES = {
    "none": "none",
    "official": "official",
    "extended": "official,probability=0.8,libraries=extended:1",
    "released_featdistill": "released_featdistill",
}
# Functions in which the time of an image is measured, and the modules that call them. What is left is drawing
# plans, changing layouts, and PyTorch's loader.
PARTS: dict[str, tuple[ModuleType, str]] = {
    "decode": (train_dataset, "load_image"),
    "distort": (train_dataset, "apply_plan"),
    "resize": (train_dataset, "fit"),
    "collate": (loading, "collate"),
}
MEAN = STD = (0.5, 0.5, 0.5)
CORES = os.cpu_count() or 1


def build_parser() -> Parser:
    number = within(1)
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", metavar="FOLDER", help="JPEG photographs to load; else synthetic scenes")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help="or PRESET,key=value")
    parser.add_argument("--sizes", nargs="+", type=number, default=[224, 384], help="input sizes in px")
    parser.add_argument(
        "--workers", nargs="+", type=worker_count(), default=[0, CORES], help="0: one core, in parts"
    )
    parser.add_argument("--count", type=number, default=16, help="different images")
    parser.add_argument("--batch", type=number, default=32, help="images per batch")
    parser.add_argument("--batches", type=number, default=6, help="batches measured, after one that is not")
    parser.add_argument("--rounds", type=number, default=2, help="measurements per figure; the best counts")
    parser.add_argument("--out", metavar="FILE.json", help="save the figures here")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    policies = {name: parse_policy(POLICIES.get(name, name)) for name in options.policies}
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = jpegs(options.images, options.count, folder)
        report = measure(policies, paths, options)
    print(
        f"Y = {report['yardstick_ms']:.2f} ms; images: {options.images or 'synthetic'}, "
        f"{report['megapixels']:.2f} Mpx on average, {options.batch * options.batches} per figure"
    )
    results, keys = pd.DataFrame(report["configurations"]), ["policy", "size", "at"]
    for title, columns in {
        "one core, processor time per image in ms": ["ms", "Y", *PARTS, "rest", "images/s"],
        f"worker processes on {CORES} cores, images/s of wall-clock time": [
            f"{workers} workers" for workers in options.workers if workers
        ],
    }.items():
        if columns and columns[0] in results:
            print_table(title, results[keys + columns].dropna())
    if options.out:
        write_json(options.out, report)
    return 0


def measure(policies: dict[str, DistortionPolicy], paths: list[str], options: argparse.Namespace) -> dict:
    """Measure every configuration `--rounds` times, in turns, and keep the best of each figure.

    Returns:
        What `--out` saves; `configurations` has a row per configuration: `policy`, `size`, `at`, the times
        of `one_core`, and the rates of `images_per_s` as "N workers".
    """
    scenes = read_scenes(paths)
    build_tables(policies.values())
    yardstick = Yardstick(scenes[0])
    results = [
        {"policy": name, "size": size, "at": at}
        for name, size, at in itertools.product(policies, options.sizes, ("native", "input"))
        if policies[name].probability > 0 or at == "native"
    ]
    # Every image as often as it takes to fill a batch; each row has plans of its own.
    images = paths * -(-options.batch // len(paths))
    rows = pd.DataFrame({"image": images, "name": images, "label": 0.0})
    work = list(itertools.product(range(options.rounds), results))
    for _, result in tqdm(work, desc="loaders", unit="configuration", disable=None):
        policy = replace(policies[result["policy"]], distort_at=result["at"])
        preprocessing = Preprocessing(result["size"], "shorter", MEAN, STD)
        ours = TrainDataset(rows, preprocessing, policy, 0, Augmentation())
        for workers in filter(None, options.workers):
            key, rate = f"{workers} workers", images_per_s(ours, workers, options)
            result[key] = max(rate, result.get(key, 0.0))
        if 0 in options.workers:
            parts = one_core(ours, options)
            if parts["ms"] <= result.get("ms", math.inf):
                result |= parts | {"images/s": 1000 / parts["ms"]}
        yardstick.measure()
    for result in results:
        if "ms" in result:
            result["Y"] = result["ms"] / yardstick.report()["yardstick_ms"]
    return {
        **yardstick.report(),
        "settings": vars(options),
        "megapixels": float(np.mean([scene.size / 3 for scene in scenes])) / 1e6,
        "versions": {package.__name__: package.__version__ for package in (cv2, np, PIL, torch)},
        "configurations": results,
    }


def build_tables(policies: Iterable[DistortionPolicy]) -> None:
    """Apply every operation that the policies may draw once at each level, so that its tables are built."""
    image, rng = synthetic_scene(0)[:64, :64], np.random.default_rng(0)
    for library in {name for policy in policies for name in policy.counts or policy.libraries}:
        for operation, level in itertools.product(LIBRARIES[library].values(), LEVELS):
            if not operation.missing():
                operation(image, level, rng)


def one_core(data: TrainDataset, options: argparse.Namespace) -> dict[str, float]:
    """Return the processor time per image in milliseconds: `ms` in all, each of `PARTS`, and `rest`."""
    spent_s = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, function: Callable) -> Callable:
        def call(*arguments, **keywords):
            start = time.process_time()
            result = function(*arguments, **keywords)
            spent_s[part] += time.process_time() - start
            return result

        return call

    with ExitStack() as patches:
        for part, (module, name) in PARTS.items():
            patches.enter_context(mock.patch.object(module, name, timed(part, getattr(module, name))))
        stream = iter(make_loader(data, _batches(data, options, 1 + options.batches), workers=0))
        next(stream)
        spent_s.update(dict.fromkeys(PARTS, 0.0))
        start = time.process_time()
        for _ in stream:
            pass
        spent_s["ms"] = time.process_time() - start
    ms = {part: 1000 * seconds / (options.batch * options.batches) for part, seconds in spent_s.items()}
    return ms | {"rest": ms["ms"] - sum(ms[part] for part in PARTS)}


def images_per_s(data: TrainDataset, workers: int, options: argparse.Namespace) -> float:
    """Return how many images per second arrive from worker processes that have started."""
    count = workers * -(-options.batches // workers)
    # Two batches per worker are in preparation at any time, at the last one measured as at the first.
    stream = iter(make_loader(data, _batches(data, options, count + 4 * workers), workers))
    for _ in range(2 * workers):
        next(stream)
    start = time.perf_counter()
    for _ in range(count):
        next(stream)
    return options.batch * count / (time.perf_counter() - start)


def _batches(data: TrainDataset, options: argparse.Namespace, count: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(TrainBatches(len(data), options.batch, count, seed=0), count))


if __name__ == "__main__":
    command_line.run(main)
