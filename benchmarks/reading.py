"""How many images a second are read from plain files, a stored zip, a tar and a parquet file.

The same JPEGs lie in all four. They are read in the same random order by one process, once their bytes alone
and once decoded as well, in turns of the four kinds, so that a machine that slows down slows all of them.
Times are of the processor, medians over the turns: the files are in the system's cache, and no disk is
measured. Rows of the parquet file stand in groups of 100, as the `datasets` library writes images; a random
row costs the rows before it in its group, so fewer are read.

    python benchmarks/reading.py --images photos/ --out reading.json
"""

import argparse
import io
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distortions import synthetic_scene
from benchmarks.timing import thread_s
from featdistill import atomic, command_line
from featdistill.atomic import write_json
from featdistill.command_line import Parser, UserError
from featdistill.images import reading as image_io

KINDS = ("files", "zip", "tar", "parquet")
COLUMNS = {"read": image_io.read_bytes, "read and decode": image_io.read_image}
ROWS_A_GROUP = 100
# The share of the images that is read in a turn, where it is not all of them.
SHARES = {"parquet": 0.1}
# (width, height) of synthetic JPEGs.
CROP_SIZE = (640, 480)


def main(argv: list[str] | None = None) -> int:
    """Write the four, measure, print the table, and save the figures where asked to."""
    options = build_parser().parse_args(argv)
    if min(options.count, options.turns) < 1:
        raise UserError("--count and --turns must be 1 or more")
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        images = read_images(options.images, options.count) if options.images else make_images(options.count)
        report = measure(write_all(Path(folder), images), options)
    report |= {"images": len(images), "bytes_an_image": round(np.mean([len(data) for data in images]))}
    print_report(report)
    if options.out:
        write_json(options.out, report)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", metavar="FOLDER", help="JPEGs to read; else synthetic ones")
    parser.add_argument("--count", type=int, default=2000, help="images at most")
    parser.add_argument("--turns", type=int, default=5, help="measurements of a figure; the median counts")
    parser.add_argument("--seed", type=int, default=0, help="another seed reads in another order")
    parser.add_argument("--out", metavar="FILE.json", help="where the figures are saved")
    return parser


def read_images(folder: str, count: int) -> list[bytes]:
    """Return the bytes of the first JPEGs below a folder."""
    paths = [path for path in image_io.list_images(folder) if path.suffix.lower() in (".jpg", ".jpeg")]
    if not paths:
        raise UserError(f"--images {folder} holds no JPEGs")
    return [path.read_bytes() for path in paths[:count]]


def make_images(count: int) -> list[bytes]:
    """Return synthetic JPEGs, no two alike."""
    scene = Image.fromarray(synthetic_scene(0))
    room = np.subtract(scene.size, CROP_SIZE)
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        left, top = rng.integers(0, room)
        file = io.BytesIO()
        scene.crop((left, top, left + CROP_SIZE[0], top + CROP_SIZE[1])).save(file, "JPEG", quality=90)
        images.append(file.getvalue())
    return images


def write_all(folder: Path, images: list[bytes]) -> dict[str, list[str]]:
    """Write the images in all four kinds; return the locations of each, in the same order."""
    from pyarrow import parquet, table

    names = [f"images/{place:06}.jpg" for place in range(len(images))]
    (folder / "images").mkdir()
    for name, data in zip(names, images, strict=True):
        (folder / name).write_bytes(data)
    atomic.write_zip(folder / "a.zip", zip(names, images, strict=True))
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name in names:
            archive.add(folder / name, arcname=name)
    cells = table({"image": [{"bytes": data, "path": ""} for data in images]})
    parquet.write_table(cells, folder / "a.parquet", row_group_size=ROWS_A_GROUP)
    return {
        "files": [str(folder / name) for name in names],
        "zip": [f"{folder}/a.zip::{name}" for name in names],
        "tar": [f"{folder}/a.tar::{name}" for name in names],
        "parquet": [f"{folder}/a.parquet::{row}" for row in range(len(images))],
    }


def measure(locations: dict[str, list[str]], options: argparse.Namespace) -> dict:
    """Return images a second by column and kind, and each as a ratio to plain files."""
    count = len(locations["files"])
    order = np.random.default_rng(options.seed).permutation(count)
    report: dict = {"turns": options.turns, "seed": options.seed}
    orders = {kind: order[: max(1, round(count * SHARES.get(kind, 1)))] for kind in KINDS}
    total = len(COLUMNS) * (options.turns + 1) * sum(map(len, orders.values()))
    with command_line.progress(total, "read") as bar:
        for column, function in COLUMNS.items():
            times: dict[str, list[float]] = {kind: [] for kind in KINDS}
            # The first turn opens the archives and brings the files into the cache, and does not count.
            for turn in range(options.turns + 1):
                for kind in KINDS:
                    seconds = time_an_image(function, [locations[kind][place] for place in orders[kind]])
                    bar.update(len(orders[kind]))
                    if turn:
                        times[kind].append(seconds)
            rates = {kind: 1 / float(np.median(times[kind])) for kind in KINDS}
            report[column] = {
                kind: {
                    "images_a_second": round(rates[kind], 1),
                    "ratio": round(rates[kind] / rates["files"], 3),
                }
                for kind in KINDS
            }
    return report


def time_an_image(function: Callable[[str], object], locations: list[str]) -> float:
    """Return the seconds that an image takes."""

    def read_all() -> None:
        for location in locations:
            function(location)

    return thread_s(read_all) / len(locations)


def print_report(report: dict) -> None:
    """Print a table: a row a kind, and the ratio to plain files beside each rate."""
    print(f"{report['images']} JPEGs of {report['bytes_an_image'] / 1000:.1f} kB, in random order")
    print(f"{'':8}" + "".join(f"{column + ', images/s':>28}{'ratio':>8}" for column in COLUMNS))
    for kind in KINDS:
        cells = [report[column][kind] for column in COLUMNS]
        print(f"{kind:8}" + "".join(f"{cell['images_a_second']:28.0f}{cell['ratio']:8.2f}" for cell in cells))


if __name__ == "__main__":
    command_line.run(main)
