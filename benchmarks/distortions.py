"""How long the distortions take, in milliseconds and yardsticks: every operation and level, and whole plans.

The yardstick Y is what Pillow takes, in the same process, to decode a JPEG of 0.66 megapixels (quality 90,
4:2:0) and to resize its shorter side to 384 (bicubic). Times in Y hold across machines far better than
milliseconds. All are processor times of one thread, so other work on the machine disturbs them little.
Where Albumentations or kornia can be imported, what they have of the same kind is timed beside ours.

    python benchmarks/distortions.py --images photos/ --out distortions.json
    python benchmarks/distortions.py --operations jitter jpeg
"""

import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distortion_tables import print_report
from benchmarks.other_implementations import Package, importable_packages
from benchmarks.timing import Yardstick, thread_s, typical_ms
from featdistill import command_line
from featdistill.atomic import write_json
from featdistill.command_line import Parser, UserError, one_of
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import LEVELS, Operation
from featdistill.distortions.plan import apply_plan
from featdistill.distortions.presets import PRESETS
from featdistill.images.reading import BrokenImage, list_images, read_image
from featdistill.process_setup import keep_freed_memory
from featdistill.seeds import training_generator

# (width, height): inputs of the backbones, and a photograph as it is found on the web.
SIZES = {"224": (224, 224), "384": (384, 384), "512": (512, 512), "1024x768": (1024, 768)}
OPERATION_SIZES = ("224", "512", "1024x768")
COMPOSITION_SIZES = ("224", "384", "1024x768")
IMAGES = 4


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables, and save them where asked to."""
    options = build_parser().parse_args(argv)
    if min(options.repeats, options.plans) < 1:
        raise UserError("--repeats and --plans must be 1 or more")
    libraries = [one_of("distortion library", name, LIBRARIES) for name in options.libraries]
    names = choose_operations(libraries, options.operations)
    presets = options.presets or ([] if options.operations else ["official"])
    presets = [one_of("distortion preset", name, PRESETS) for name in presets]
    scenes = read_scenes(options.images) if options.images else list(map(synthetic_scene, range(IMAGES)))
    cv2.setNumThreads(0)
    keep_freed_memory()  # As the loader's workers do.

    packages = importable_packages()
    yardstick = Yardstick(scenes[0], options.repeats)
    times, others = measure_operations(names, scenes, options.repeats, packages, yardstick)
    compositions = measure_compositions(presets, scenes, options.plans, yardstick)
    report = {
        "yardstick_ms": yardstick.ms,
        "yardstick_measurements_ms": yardstick.measured_ms,
        "scenes": options.images or "synthetic",
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "packages": {package.name: package.version for package in packages},
        "operations": times,
        "others": others,
        "compositions": compositions,
    }
    print_report(report)
    if options.out:
        write_json(options.out, report)
    return 0


def build_parser() -> Parser:
    """Return the parser of this script."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", metavar="FOLDER", help="photographs to measure on; else synthetic scenes")
    parser.add_argument(
        "--libraries", nargs="+", default=list(LIBRARIES), help="whose operations are measured"
    )
    parser.add_argument(
        "--operations", nargs="+", default=[], metavar="NAME", help="measure these alone, and no plans"
    )
    parser.add_argument(
        "--presets",
        nargs="+",
        default=[],
        metavar="NAME",
        help="policies whose plans are measured (official where --operations is not given)",
    )
    parser.add_argument("--repeats", type=int, default=7, help="runs of each operation; their median counts")
    parser.add_argument("--plans", type=int, default=300, help="plans drawn for each preset and size")
    parser.add_argument("--out", metavar="FILE.json", help="where the times are saved")
    return parser


def choose_operations(libraries: list[str], asked: list[str]) -> dict[str, list[str]]:
    """Return the names of the operations to measure by library: those asked for, or all that can be applied.

    Raises:
        UserError: a name that is asked for is unknown, or needs something that is not installed.
    """
    known = list(dict.fromkeys(name for library in libraries for name in LIBRARIES[library]))
    wanted = [one_of("distortion operation", name, known) for name in asked] or known
    names: dict[str, list[str]] = {}
    for library in libraries:
        for name, operation in LIBRARIES[library].items():
            if name in asked and operation.missing():
                raise UserError(f"--operations {name}: to apply it, install {operation.missing()}")
            if name in wanted and not operation.missing():
                names.setdefault(library, []).append(name)
    return names


def read_scenes(folder: str) -> list[np.ndarray]:
    """Read up to `IMAGES` photographs, spread evenly over a folder's sorted list."""
    paths = list_images(folder)
    if not paths:
        raise UserError(f"--images {folder}: no image files in it")
    try:
        return [read_image(str(paths[place])) for place in range(0, len(paths), -(-len(paths) // IMAGES))]
    except BrokenImage as error:
        raise UserError(f"--images {folder}: {error}") from error


def synthetic_scene(seed: int) -> np.ndarray:
    """Return a picture with the falling spectrum of a photograph, (768, 1024, 3) uint8."""
    rng = np.random.default_rng(seed)
    scene = np.zeros((768, 1024, 3), np.float32)
    for cell_px in (256, 64, 16, 4, 1):
        coarse = rng.normal(0, cell_px**0.5, (-(-768 // cell_px) + 1, -(-1024 // cell_px) + 1, 3))
        scene += cv2.resize(coarse.astype(np.float32), (1024, 768), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 2.5 * scene, 0, 255).astype(np.uint8)


def fitted(scenes: list[np.ndarray], size: tuple[int, int]) -> list[np.ndarray]:
    """Cut and resize every scene to (width, height)."""
    return [
        np.array(ImageOps.fit(Image.fromarray(scene), size, Image.Resampling.BICUBIC)) for scene in scenes
    ]


def measure_operations(
    names: dict[str, list[str]],
    scenes: list[np.ndarray],
    repeats: int,
    packages: list[Package],
    yardstick: Yardstick,
) -> tuple[dict, dict]:
    """Time operations (by library) and, right after each, its counterparts in other packages.

    Returns:
        {library: {operation: {size: [ms at level 1 .. 5]}}}, and {package: {library: {operation: times}}},
        see `compare`.
    """
    images = {size: fitted(scenes, SIZES[size]) for size in OPERATION_SIZES}
    times: dict = {library: {} for library in names}
    others: dict = {package.name: {library: {} for library in names} for package in packages}
    work = [(library, name) for library in names for name in names[library]]
    yardstick.measure()
    for library, name in tqdm(work, desc="operations", unit="operation", disable=None):
        operation = LIBRARIES[library][name]
        functions = [_seeded(operation, level) for level in LEVELS]
        ours = {
            size: [typical_ms(function, images[size], repeats) for function in functions]
            for size in OPERATION_SIZES
        }
        times[library][name] = ours
        for package in packages:
            if name in package.counterparts:
                others[package.name][library][name] = compare(operation, package, ours, images, repeats)
        yardstick.measure()
    return times, others


def compare(operation: Operation, package: Package, ours: dict, images: dict, repeats: int) -> dict:
    """Time the counterpart of an operation.

    Returns:
        "counterpart" (its name), "nearest" (it does not do quite the same) and "sizes": {size: {"ours_ms",
        "theirs_ms", "ratio"}}, means over the levels; or "refused" (why) where this version of the package
        does not have it.
    """
    counterpart = package.counterparts[operation.name]
    result: dict = {"counterpart": counterpart.name, "nearest": counterpart.nearest}
    try:
        functions = [package.build(operation.name, scale) for scale in operation.scales]
    except (AttributeError, TypeError, ValueError) as error:
        return result | {"refused": " ".join(str(error).split())}
    result["sizes"] = {}
    for size, of_size in images.items():
        theirs_ms = float(np.mean([typical_ms(function, of_size, repeats) for function in functions]))
        ours_ms = float(np.mean(ours[size]))
        result["sizes"][size] = {"ours_ms": ours_ms, "theirs_ms": theirs_ms, "ratio": theirs_ms / ours_ms}
    return result


def measure_compositions(
    presets: list[str], scenes: list[np.ndarray], plans: int, yardstick: Yardstick
) -> dict:
    """Time drawing a plan and applying it, for each of `plans` plans.

    Returns:
        {preset: {size: {"mean_ms", "median_ms", "p99_ms", "p99_over_median"}}}, statistics over the plans.
    """
    times: dict = {}
    for preset in presets:
        times[preset] = {}
        for size in COMPOSITION_SIZES:
            images = fitted(scenes, SIZES[size])
            # The smaller of two runs of each plan: else a hiccup of the machine would be a percentile.
            runs_ms = np.empty((2, plans))
            for run, index in tqdm(
                list(np.ndindex(2, plans)), desc=f"{preset} {size}", unit="image", disable=None
            ):
                image = images[index % len(images)]
                runs_ms[run, index] = 1000 * thread_s(_composed(preset, index, image))
            of_plan_ms = runs_ms.min(axis=0)
            median_ms, p99_ms = (float(np.percentile(of_plan_ms, share)) for share in (50, 99))
            times[preset][size] = {
                "mean_ms": float(of_plan_ms.mean()),
                "median_ms": median_ms,
                "p99_ms": p99_ms,
                "p99_over_median": p99_ms / median_ms,
            }
            yardstick.measure()
    return times


def _seeded(operation: Operation, level: int) -> Callable[[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(level)
    return lambda image: operation(image, level, rng)


def _composed(preset: str, index: int, image: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: apply_plan(image, PRESETS[preset].draw(training_generator(0, 0, index)))


if __name__ == "__main__":
    command_line.run(main)
