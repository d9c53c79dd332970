"""How long the distortions take, in milliseconds and yardsticks: every operation and level, and whole plans.

The yardstick Y is what Pillow takes, in the same process, to decode a JPEG of 0.66 megapixels (quality 90,
4:2:0) and to resize its shorter side to 384 (bicubic). Times in Y hold across machines far better than
milliseconds. All are processor times of one thread, so other work on the machine disturbs them little.

    python benchmarks/distortions.py --images photos/ --out distortions.json
"""

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from featdistill import command_line
from featdistill.atomic import write_json
from featdistill.command_line import Parser, UserError, one_of
from featdistill.distortion_policy import LIBRARIES, PRESETS, apply_plan, training_generator
from featdistill.image_io import BrokenImage, list_images, read_image
from featdistill.operations import LEVELS

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
    presets = [one_of("distortion preset", name, PRESETS) for name in options.presets]
    scenes = read_scenes(options.images) if options.images else list(map(synthetic_scene, range(IMAGES)))
    cv2.setNumThreads(0)

    yardstick_ms = measure_yardstick(scenes[0], options.repeats)
    report = {
        "yardstick_ms": yardstick_ms,
        "scenes": options.images or "synthetic",
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "operations": measure_operations(libraries, scenes, options.repeats),
        "compositions": measure_compositions(presets, scenes, options.plans),
    }
    # The mean of a measurement before and one after: the machine may have slowed down meanwhile.
    report["yardstick_ms"] = (yardstick_ms + measure_yardstick(scenes[0], options.repeats)) / 2
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
        "--presets", nargs="+", default=["official"], help="policies whose plans are measured"
    )
    parser.add_argument("--repeats", type=int, default=7, help="runs of each operation; their median counts")
    parser.add_argument("--plans", type=int, default=300, help="plans drawn for each preset and size")
    parser.add_argument("--out", metavar="FILE.json", help="where the times are saved")
    return parser


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
        np.asarray(ImageOps.fit(Image.fromarray(scene), size, Image.Resampling.BICUBIC)) for scene in scenes
    ]


def measure_yardstick(scene: np.ndarray, repeats: int) -> float:
    """Return Y in milliseconds."""
    file = io.BytesIO()
    ImageOps.fit(Image.fromarray(scene), (940, 704), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)

    def decode_and_resize() -> None:
        with Image.open(io.BytesIO(file.getvalue())) as image:
            image.convert("RGB").resize((round(940 * 384 / 704), 384), Image.Resampling.BICUBIC)

    return median_ms(decode_and_resize, 5 * repeats)


def measure_operations(libraries: list[str], scenes: list[np.ndarray], repeats: int) -> dict:
    """Return {library: {operation: {size: [ms at level 1 .. 5]}}}."""
    images = {size: fitted(scenes, SIZES[size]) for size in OPERATION_SIZES}
    times: dict = {}
    work = [(library, name) for library in libraries for name in LIBRARIES[library]]
    for library, name in tqdm(work, desc="operations", unit="operation", disable=None):
        operation = LIBRARIES[library][name]
        times.setdefault(library, {})[name] = {
            size: [
                float(np.mean([median_ms(_call(operation, image, level), repeats) for image in images[size]]))
                for level in LEVELS
            ]
            for size in OPERATION_SIZES
        }
    return times


def measure_compositions(presets: list[str], scenes: list[np.ndarray], plans: int) -> dict:
    """Return {preset: {size: mean ms of drawing a plan and applying it}}."""
    times: dict = {}
    for preset in presets:
        times[preset] = {}
        for size in COMPOSITION_SIZES:
            images = fitted(scenes, SIZES[size])
            start = time.thread_time()
            for index in tqdm(range(plans), desc=f"{preset} {size}", unit="image", disable=None):
                plan = PRESETS[preset].draw(training_generator(0, 0, index))
                apply_plan(images[index % len(images)], plan)
            times[preset][size] = 1000 * (time.thread_time() - start) / plans
    return times


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call, in milliseconds, after one call that does not count."""
    call()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return 1000 * float(np.median(times))


def print_report(report: dict) -> None:
    """Print milliseconds at each level, and in yardsticks their mean and their highest."""
    yardstick_ms = report["yardstick_ms"]
    print(f"Y = {yardstick_ms:.2f} ms")
    for library, operations in report["operations"].items():
        titles = "".join(f"{f'level {level}':>9}" for level in LEVELS)
        print(f"\n{library:20} {'size':9}{titles}{'mean Y':>9}{'max Y':>9}")
        for name, sizes in operations.items():
            for size, levels in sizes.items():
                cells = "".join(f"{milliseconds:9.2f}" for milliseconds in levels)
                mean, highest = np.mean(levels) / yardstick_ms, max(levels) / yardstick_ms
                print(f"{name:20} {size:9}{cells}{mean:9.3f}{highest:9.3f}")
    print(f"\n{'preset':20} {'size':9}{'ms':>9}{'Y':>9}")
    for preset, sizes in report["compositions"].items():
        for size, milliseconds in sizes.items():
            print(f"{preset:20} {size:9}{milliseconds:9.2f}{milliseconds / yardstick_ms:9.3f}")


def _call(operation: Callable, image: np.ndarray, level: int) -> Callable[[], np.ndarray]:
    rng = np.random.default_rng(level)
    return lambda: operation(image, level, rng)


if __name__ == "__main__":
    command_line.run(main)
