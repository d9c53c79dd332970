"""How long the distortions take, in milliseconds and yardsticks: every operation and level, and whole plans.

The yardstick Y is the time that Pillow takes, in the same process, to decode a JPEG of 0.66 megapixels
(quality 90, 4:2:0) and to resize its shorter side to 384 (bicubic). Times in Y are comparable across
machines, milliseconds are not. All are processor times of one thread, so other work on the machine matters
little. Where Albumentations or kornia is installed, its counterparts of the operations are timed as well.

    python benchmarks/distortions.py --images photos/ --out distortions.json
    python benchmarks/distortions.py --operations jitter jpeg
"""

import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from scipy.stats import gmean
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.other_implementations import Package, importable_packages
from benchmarks.scenes import fitted, print_table, scenes
from benchmarks.timing import Yardstick, thread_s, typical_ms
from featdistill import command_line
from featdistill.atomic import write_json
from featdistill.command_line import Parser, UserError, one_of, within
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import LEVELS, Operation
from featdistill.distortions.plan import apply_plan
from featdistill.distortions.presets import PRESETS
from featdistill.process_setup import keep_freed_memory
from featdistill.seeds import training_generator

# (width, height): inputs of the backbones, and a typical photograph from the web.
SIZES = {"224": (224, 224), "384": (384, 384), "512": (512, 512), "1024x768": (1024, 768)}
OPERATION_SIZES = ("224", "512", "1024x768")
PLAN_SIZES = ("224", "384", "1024x768")
LEVEL_COLUMNS = [f"level {level} ms" for level in LEVELS]
IMAGES = 4


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", metavar="FOLDER", help="photographs to measure on; else synthetic scenes")
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), help="libraries to measure")
    parser.add_argument(
        "--operations", nargs="+", default=[], metavar="NAME", help="only these operations, and no plans"
    )
    parser.add_argument(
        "--presets",
        nargs="+",
        default=[],
        metavar="NAME",
        help="policies whose plans are measured (default: official, or none with --operations)",
    )
    parser.add_argument("--repeats", type=within(1), default=7, help="runs per operation; the median counts")
    parser.add_argument("--plans", type=within(1), default=300, help="plans drawn for each preset and size")
    parser.add_argument("--out", metavar="FILE.json", help="save the times here")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    libraries = [one_of("distortion library", name, LIBRARIES) for name in options.libraries]
    operations = choose_operations(libraries, options.operations)
    presets = options.presets or ([] if options.operations else ["official"])
    presets = [one_of("distortion preset", name, PRESETS) for name in presets]
    pictures = scenes(options.images, IMAGES)
    cv2.setNumThreads(0)
    keep_freed_memory()  # As the loader's workers do.

    packages = importable_packages()
    yardstick = Yardstick(pictures[0], options.repeats)
    images = {size: [fitted(scene, pixels) for scene in pictures] for size, pixels in SIZES.items()}
    times, compared = measure_operations(operations, images, options.repeats, packages, yardstick)
    report = {
        "operations": times,
        "others": compared,
        "plans": measure_plans(presets, images, options.plans, yardstick),
        "scenes": options.images or "synthetic",
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "packages": {package.name: package.version for package in packages},
    }
    report |= yardstick.report()
    print_report(report)
    if options.out:
        write_json(options.out, report)
    return 0


def choose_operations(libraries: list[str], requested: list[str]) -> list[tuple[str, Operation]]:
    """Return (library, operation) for the requested names, or for all that can be applied.

    Raises:
        UserError: a requested name is unknown, or needs something that is not installed.
    """
    pairs = [(library, operation) for library in libraries for operation in LIBRARIES[library].values()]
    names = list(dict.fromkeys(operation.name for _, operation in pairs))
    for name in requested:
        one_of("distortion operation", name, names)
    chosen = [pair for pair in pairs if pair[1].name in (requested or names)]
    for _, operation in chosen:
        if requested and operation.missing():
            raise UserError(f"--operations {operation.name}: to apply it, install {operation.missing()}")
    return [pair for pair in chosen if not pair[1].missing()]


def measure_operations(
    operations: list[tuple[str, Operation]],
    images: dict[str, list[np.ndarray]],
    repeats: int,
    packages: list[Package],
    yardstick: Yardstick,
) -> tuple[list[dict], list[dict]]:
    """Time operations and, right after each, its counterparts in other packages.

    Returns:
        Rows of `library`, `operation`, `size` and the milliseconds at each level; and rows that compare the
        means over the levels: `ours_ms`, `theirs_ms`, `ratio`, and `theirs`, the name of the counterpart, or
        why this version of the package cannot do it.
    """
    rows, compared = [], []
    yardstick.measure()
    for library, operation in tqdm(operations, desc="operations", unit="operation", disable=None):
        for size in OPERATION_SIZES:
            of_levels = [partial(operation, level=n, rng=np.random.default_rng(n)) for n in LEVELS]
            levels_ms = [typical_ms(function, images[size], repeats) for function in of_levels]
            row = {"library": library, "operation": operation.name, "size": size}
            rows.append(row | dict(zip(LEVEL_COLUMNS, levels_ms, strict=True)))
            ours_ms = float(np.mean(levels_ms))
            for package in packages:
                if operation.name not in package.counterparts:
                    continue
                comparison = {"package": package.name, **row, "ours_ms": ours_ms}
                try:
                    theirs = [package.build(operation.name, scale) for scale in operation.scales]
                except (AttributeError, TypeError, ValueError) as error:
                    compared.append(comparison | {"theirs": " ".join(str(error).split())})
                    continue
                theirs_ms = float(
                    np.mean([typical_ms(function, images[size], repeats) for function in theirs])
                )
                comparison |= {"theirs_ms": theirs_ms, "ratio": theirs_ms / ours_ms}
                compared.append(comparison | {"theirs": package.title(operation.name)})
        yardstick.measure()
    return rows, compared


def measure_plans(
    presets: list[str], images: dict[str, list[np.ndarray]], plans: int, yardstick: Yardstick
) -> list[dict]:
    """Time drawing a plan and applying it, for each of `plans` plans.

    Returns:
        Rows of `preset`, `size`, and `mean_ms`, `median_ms`, `p99_ms`, `p99_over_median` over the plans.
    """
    rows = []
    for preset, size in itertools.product(presets, PLAN_SIZES):
        times_ms = []
        for index in tqdm(range(plans), desc=f"{preset} {size}", unit="image", disable=None):
            apply = _planned(preset, index, images[size][index % len(images[size])])
            # The smaller of two runs: otherwise a hiccup of the machine could be the percentile.
            times_ms.append(1000 * min(thread_s(apply) for _ in range(2)))
        median, p99 = np.percentile(times_ms, (50, 99)).tolist()
        figures = {"mean_ms": float(np.mean(times_ms)), "median_ms": median, "p99_ms": p99}
        rows.append({"preset": preset, "size": size, **figures, "p99_over_median": p99 / median})
        yardstick.measure()
    return rows


def _planned(preset: str, index: int, image: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: apply_plan(image, PRESETS[preset].draw(training_generator(0, 1, 0, index)))


def print_report(report: dict) -> None:
    """Print what was measured: milliseconds, and multiples of the yardstick."""
    yardstick_ms = report["yardstick_ms"]
    versions = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    print(f"Y = {yardstick_ms:.2f} ms; {versions or 'neither Albumentations nor kornia is installed'}")
    table = pd.DataFrame(report["operations"])
    levels = table[LEVEL_COLUMNS]
    table["mean Y"], table["max Y"] = levels.mean(axis=1) / yardstick_ms, levels.max(axis=1) / yardstick_ms
    print_table("every operation", table)
    if report["others"]:
        table = pd.DataFrame(report["others"])
        print_table("next to other implementations, means over the levels", table)
        if "ratio" in table:
            ratios = table.dropna().groupby(["package", "library", "size"], sort=False)["ratio"]
            print_table("geometric means of the ratios", ratios.agg(gmean).reset_index())
    if report["plans"]:
        table = pd.DataFrame(report["plans"])
        for name in ("mean", "median", "p99"):
            table[f"{name} Y"] = table[f"{name}_ms"] / yardstick_ms
        print_table("plans drawn and applied", table)


if __name__ == "__main__":
    command_line.run(main)
