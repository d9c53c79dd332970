"""How many images a second the training loader makes: decode, distort, resize, crop, and stack to batches.

Every configuration (policy, input size, distortions at the native or at the input size) is measured on one
core in processor time, with the share of each part, and with worker processes in time on the clock. At 384
the same work is also done by a plain loader of float arrays, see `plain_loader.py`. The yardstick Y is that
of `distortions.py`: what Pillow takes to decode 0.66 megapixels and to resize them to 384.

    python benchmarks/loader.py --images photos/ --out loader.json
    python benchmarks/loader.py --policies none official,max_operations=5 --sizes 224 --no-plain
"""

import argparse
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pandas as pd
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plain_loader
from benchmarks.distortions import fitted, synthetic_scene
from benchmarks.timing import Yardstick
from featdistill import command_line
from featdistill.atomic import write_json
from featdistill.command_line import Parser, UserError
from featdistill.data import train_dataset as dataset
from featdistill.data.loading import make_loader
from featdistill.data.preprocessing import Preprocessing
from featdistill.data.sampling import TrainBatches
from featdistill.data.train_dataset import TrainDataset
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.official import OFFICIAL
from featdistill.distortions.operation import LEVELS
from featdistill.distortions.policy import DistortionPolicy
from featdistill.distortions.presets import parse_policy
from featdistill.images.reading import BrokenImage, list_images, read_image

# By the name in the tables; whatever else `parse_policy` takes can be asked for as well.
POLICIES = {
    "none": "none",
    "official": "official",
    "extended": "official,probability=0.8,libraries=extended:1",
    "released_featdistill": "released_featdistill",
}
# Where an image's time is spent: functions that `featdistill.data.train_dataset` calls. The rest is the
# drawing of the plan, changes of layout between the parts, and PyTorch's loader.
PARTS = {"decode": "load_image", "distort": "apply_plan", "resize": "fit", "collate": "collate"}
PLAIN_SIZE = 384
# (width, height) of synthetic scenes, as of the yardstick's.
SCENE_SIZE = (940, 704)
MEAN = STD = (0.5, 0.5, 0.5)
CORES = os.cpu_count() or 1


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables, and save the figures where asked to."""
    options = build_parser().parse_args(argv)
    if min(options.count, options.batch, options.batches, options.rounds, *options.sizes) < 1:
        raise UserError("--count, --batch, --batches, --rounds and --sizes must be 1 or more")
    if min(options.workers) < 0:
        raise UserError("--workers must be 0 or more")
    policies = read_policies(options.policies)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        count = options.count
        paths = find_images(options.images, count) if options.images else make_images(folder, count)
        try:
            report = measure(policies, paths, options)
        except BrokenImage as error:
            raise UserError(f"--images {options.images}: {error}") from error
    print_report(report)
    if options.out:
        write_json(options.out, report)
    return 0


def build_parser() -> Parser:
    """Return the parser of this script."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", metavar="FOLDER", help="JPEG photographs to load; else synthetic scenes")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help="or PRESET,key=value")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 384], help="input sizes in px")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, CORES], help="0: one core, in parts")
    parser.add_argument("--count", type=int, default=16, help="different images")
    parser.add_argument("--batch", type=int, default=32, help="images a batch")
    parser.add_argument("--batches", type=int, default=6, help="batches that count, after one that does not")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of a figure; the best counts")
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain loader")
    parser.add_argument("--out", metavar="FILE.json", help="where the figures are saved")
    return parser


def read_policies(names: list[str]) -> dict[str, DistortionPolicy]:
    """Return the policies by name; where there is no extended library, its policy is left out, saying so."""
    policies = {}
    for name in names:
        if name == "extended" and name not in LIBRARIES:
            print("extended: left out, there is no distortion library of this name")
        else:
            policies[name] = parse_policy(POLICIES.get(name, name))
    return policies


def find_images(folder: str, count: int) -> list[str]:
    """Return up to `count` JPEGs, spread evenly over a folder's sorted list."""
    paths = [str(path) for path in list_images(folder) if path.suffix.lower() in (".jpg", ".jpeg")]
    if not paths:
        raise UserError(f"--images {folder}: no JPEG files in it")
    return paths[:: -(-len(paths) // count)]


def make_images(folder: str, count: int) -> list[str]:
    """Write synthetic scenes of 0.66 megapixels as JPEGs (quality 90, 4:2:0)."""
    paths = [str(Path(folder) / f"{seed:04d}.jpg") for seed in range(count)]
    for seed, path in enumerate(paths):
        scene = fitted([synthetic_scene(seed)], SCENE_SIZE)[0]
        Image.fromarray(scene).save(path, quality=90)
    return paths


def measure(policies: dict[str, DistortionPolicy], paths: list[str], options: argparse.Namespace) -> dict:
    """Measure every configuration `--rounds` times, in turns, and keep the best of each figure.

    Returns:
        What `--out` saves; "configurations" is a list of {"policy", "size", "at", "one_core", "plain_ms",
        "workers"}, see `one_core`, `plain_ms` and `images_per_s`.
    """
    scenes = [read_image(path) for path in paths]
    build_tables(policies.values())
    yardstick = Yardstick(scenes[0], repeats=7)
    results = [
        {"policy": name, "size": size, "at": at, "workers": {}}
        for name, size, at in itertools.product(policies, options.sizes, ("native", "input"))
        if policies[name].probability > 0 or at == "native"
    ]
    work = list(itertools.product(range(options.rounds), results))
    for _, result in tqdm(work, desc="loaders", unit="configuration", disable=None):
        policy = replace(policies[result["policy"]], distort_at=result["at"])
        # Every image as often as it takes to fill a batch; each row has plans of its own.
        images = paths * -(-options.batch // len(paths))
        rows = pd.DataFrame({"image": images, "name": images, "label": 0.0})
        preprocessing = Preprocessing(result["size"], "shorter", MEAN, STD)
        ours = TrainDataset(rows, preprocessing, policy, seed=0)
        for workers in sorted(options.workers):
            if workers:
                found = images_per_s(ours, workers, options)
                result["workers"][workers] = max(found, result["workers"].get(workers, 0.0))
            else:
                found = one_core(ours, options)
                result["one_core"] = min(found, result.get("one_core", found), key=lambda parts: parts["ms"])
        if 0 in options.workers and result["size"] == PLAIN_SIZE and not options.no_plain:
            plain = plain_loader.PlainDataset(rows, preprocessing, policy, seed=0)
            result["plain_ms"] = min(plain_ms(plain, options), result.get("plain_ms", math.inf))
        yardstick.measure()
    return {
        "yardstick_ms": yardstick.ms,
        "yardstick_measurements_ms": yardstick.measured_ms,
        "images": options.images or "synthetic",
        "megapixels": float(np.mean([scene.shape[0] * scene.shape[1] for scene in scenes])) / 1e6,
        "batch": options.batch,
        "images_of_a_figure": options.batch * options.batches,
        "policies": {name: repr(policy) for name, policy in policies.items()},
        "versions": {package.__name__: package.__version__ for package in (cv2, np, PIL, torch)},
        "plain_difference": {} if options.no_plain else differences(scenes[0]),
        "configurations": results,
    }


def build_tables(policies: Iterable[DistortionPolicy]) -> None:
    """Apply every operation that the policies may draw once at each level, so that its tables are there."""
    image, rng = synthetic_scene(0)[:64, :64], np.random.default_rng(0)
    for library in {name for policy in policies for name in policy.counts or policy.libraries}:
        for operation, level in itertools.product(LIBRARIES[library].values(), LEVELS):
            if not operation.missing():
                operation(image, level, rng)


def one_core(data: TrainDataset, options: argparse.Namespace) -> dict[str, float]:
    """Return the processor time of an image in milliseconds: "ms" of all, each of `PARTS`, and "rest"."""
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(part: str) -> Callable:
        function = getattr(dataset, PARTS[part])

        def call(*arguments):
            start = time.process_time()
            result = function(*arguments)
            spent[part] += time.process_time() - start
            return result

        return call

    with mock.patch.multiple(dataset, **{PARTS[part]: timed(part) for part in PARTS}):
        stream = iter(make_loader(data, _batches(data, options, 1 + options.batches), workers=0))
        next(stream)
        spent.update(dict.fromkeys(PARTS, 0.0))
        total_ms = _processor_ms(stream, options)
    parts = {part: 1000 * seconds / (options.batch * options.batches) for part, seconds in spent.items()}
    return {"ms": total_ms} | parts | {"rest": total_ms - sum(parts.values())}


def plain_ms(data: plain_loader.PlainDataset, options: argparse.Namespace) -> float:
    """Return the processor time of an image in the plain loader on one core, in milliseconds."""
    stream = iter(DataLoader(data, batch_sampler=_batches(data, options, 1 + options.batches)))
    next(stream)
    return _processor_ms(stream, options)


def images_per_s(data: TrainDataset, workers: int, options: argparse.Namespace) -> float:
    """Return how many images a second arrive from worker processes that are under way."""
    count = workers * -(-options.batches // workers)
    # Two batches a worker are under way at any time: at the last one that counts just as at the first.
    stream = iter(make_loader(data, _batches(data, options, count + 4 * workers), workers))
    for _ in range(2 * workers):
        next(stream)
    start = time.perf_counter()
    for _ in range(count):
        next(stream)
    return options.batch * count / (time.perf_counter() - start)


def differences(scene: np.ndarray) -> dict[str, float]:
    """Compare the plain loader's deterministic operations with ours.

    Returns:
        {operation: mean absolute difference in steps of 255, of the level where it is largest}.
    """
    pixels, rng = scene.astype(np.float32) / 255, np.random.default_rng(0)
    found = {}
    for name, operation in OFFICIAL.items():
        if not operation.random:
            pairs = [
                (operation(scene, level, rng), plain_loader.OPERATIONS[name](pixels, scale, rng))
                for level, scale in zip(LEVELS, operation.scales, strict=True)
            ]
            found[name] = max(
                float(np.abs(ours - 255 * np.clip(plain, 0, 1)).mean()) for ours, plain in pairs
            )
    return found


def _batches(data: Dataset, options: argparse.Namespace, count: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(TrainBatches(len(data), options.batch, count, seed=0), count))


def _processor_ms(stream: Iterator[dict], options: argparse.Namespace) -> float:
    start = time.process_time()
    for _ in stream:
        pass
    return 1000 * (time.process_time() - start) / (options.batch * options.batches)


def print_report(report: dict) -> None:
    """Print the tables, at most 110 columns wide."""
    yardstick_ms, measured_ms = report["yardstick_ms"], report["yardstick_measurements_ms"]
    print(
        f"Y = {yardstick_ms:.2f} ms (median of {len(measured_ms)}, {min(measured_ms):.2f} to "
        f"{max(measured_ms):.2f})\nimages: {report['images']}, {report['megapixels']:.2f} Mpx in the mean, "
        f"{report['images_of_a_figure']} a figure in batches of {report['batch']}"
    )
    results = report["configurations"]
    if any("one_core" in result for result in results):
        print("\none core, processor time of an image in ms; share: of decode and resize")
        titles = ["images/s", "all ms", "all Y", *PARTS, "rest", "share"]
        print(f"{'policy':24}{'size':>5} {'at':7}" + "".join(f"{title:>8}" for title in titles))
    for result in results:
        if "one_core" in result:
            parts = result["one_core"]
            share = 100 * (parts["decode"] + parts["resize"]) / parts["ms"]
            cells = f"{1000 / parts['ms']:8.0f}{parts['ms']:8.2f}{parts['ms'] / yardstick_ms:8.2f}"
            cells += "".join(f"{parts[part]:8.2f}" for part in (*PARTS, "rest")) + f"{share:6.0f} %"
            print(_title(result) + cells)
    if any(result["workers"] for result in results):
        print(f"\nworker processes on {CORES} cores, images/s on the clock, all and a core")
        counts = results[0]["workers"]
        titles = "".join(f"{f'{workers} workers':>12}{'a core':>8}" for workers in counts)
        print(f"{'policy':24}{'size':>5} {'at':7}{titles}")
        for result in results:
            rates = result["workers"].items()
            print(_title(result) + "".join(f"{rate:12.0f}{rate / min(n, CORES):8.0f}" for n, rate in rates))
    if any("plain_ms" in result for result in results):
        print("\none core, against a plain loader of float arrays, images/s")
        print(f"{'policy':24}{'size':>5} {'at':7}{'ours':>8}{'plain':>8}{'plain Y':>9}{'ratio':>8}")
    for result in results:
        if "plain_ms" in result:
            ours_ms, theirs_ms = result["one_core"]["ms"], result["plain_ms"]
            cells = f"{1000 / ours_ms:8.0f}{1000 / theirs_ms:8.1f}{theirs_ms / yardstick_ms:9.2f}"
            print(_title(result) + cells + f"{theirs_ms / ours_ms:8.1f}")
    if report["plain_difference"]:
        name, difference = max(report["plain_difference"].items(), key=lambda pair: pair[1])
        print(
            "the plain loader's deterministic operations differ from ours by at most "
            f"{difference:.2f} of 255 in the mean ({name})"
        )


def _title(result: dict) -> str:
    return f"{result['policy'][:23]:24}{result['size']:5} {result['at']:7}"


if __name__ == "__main__":
    command_line.run(main)
