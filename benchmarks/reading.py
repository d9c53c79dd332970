"""How many images per second are read from plain files, a stored zip, a tar and a parquet file.

All four hold the same JPEGs. One process reads them in the same random order, first only their bytes and then
decoding them as well, taking turns between the four, so that a machine that slows down slows all of them.
Times are processor times, medians over the turns: the files are in the system's cache, and no disk is
measured. The parquet file has groups of 100 rows, as the `datasets` library writes images; a random row costs
the rows before it in its group, so fewer are read.

    python benchmarks/reading.py --images photos/ --out reading.json
"""

import argparse
import sys
import tarfile
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scenes import jpegs
from benchmarks.timing import thread_s
from featdistill import atomic, command_line
from featdistill.command_line import Parser, within
from featdistill.images.reading import read_bytes, read_image

FUNCTIONS = {"read": read_bytes, "read and decode": read_image}
ROWS_PER_GROUP = 100
# The share of the images that is read in a turn, where it is not all of them.
SHARES = {"parquet": 0.1}


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", metavar="FOLDER", help="JPEGs to read; else synthetic ones")
    parser.add_argument("--count", type=within(1), default=2000, help="maximum number of images")
    parser.add_argument(
        "--turns", type=within(1), default=5, help="measurements per figure; the median counts"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the order")
    parser.add_argument("--out", metavar="FILE.json", help="save the figures here")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = jpegs(options.images, options.count, folder, megapixels=0.3)
        images = [Path(path).read_bytes() for path in paths]
        rows = measure(write_all(Path(folder), images), options)
    print(f"{len(images)} JPEGs of {np.mean([len(data) for data in images]) / 1000:.1f} kB, in random order")
    print(pd.DataFrame(rows).round(2).to_string(index=False))
    if options.out:
        settings = {"images": len(images), "turns": options.turns, "seed": options.seed}
        atomic.write_json(options.out, settings | {"rows": rows})
    return 0


def write_all(folder: Path, images: list[bytes]) -> dict[str, list[str]]:
    """Write the images in all four forms; return the locations in each, in the same order."""
    from pyarrow import parquet, table

    names = [f"images/{index:06}.jpg" for index in range(len(images))]
    (folder / "images").mkdir()
    for name, data in zip(names, images, strict=True):
        (folder / name).write_bytes(data)
    atomic.write_zip(folder / "a.zip", zip(names, images, strict=True))
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name in names:
            archive.add(folder / name, arcname=name)
    cells = table({"image": [{"bytes": data, "path": ""} for data in images]})
    parquet.write_table(cells, folder / "a.parquet", row_group_size=ROWS_PER_GROUP)
    return {
        "files": [str(folder / name) for name in names],
        "zip": [f"{folder}/a.zip::{name}" for name in names],
        "tar": [f"{folder}/a.tar::{name}" for name in names],
        "parquet": [f"{folder}/a.parquet::{row}" for row in range(len(images))],
    }


def measure(locations: dict[str, list[str]], options: argparse.Namespace) -> list[dict]:
    """Return a row per form: images per second of each function, and their ratio to plain files."""
    count = len(locations["files"])
    order = np.random.default_rng(options.seed).permutation(count)
    orders = {form: order[: max(1, round(count * SHARES.get(form, 1)))] for form in locations}
    rows: list[dict] = [{"from": form} for form in locations]
    total = len(FUNCTIONS) * (options.turns + 1) * sum(map(len, orders.values()))
    with command_line.progress(total, "read") as bar:
        for title, function in FUNCTIONS.items():
            times: dict[str, list[float]] = {form: [] for form in locations}
            # The first turn opens the archives and fills the cache, and is not counted.
            for turn in range(options.turns + 1):
                for form, indices in orders.items():
                    chosen = [locations[form][index] for index in indices]
                    seconds = thread_s(lambda chosen=chosen, function=function: [*map(function, chosen)])
                    bar.update(len(chosen))
                    if turn:
                        times[form].append(seconds / len(chosen))
            for row in rows:
                rate = 1 / float(np.median(times[row["from"]]))
                row[f"{title}, images/s"] = rate
                row[f"{title}, ratio"] = rate / rows[0][f"{title}, images/s"]
    return rows


if __name__ == "__main__":
    command_line.run(main)
