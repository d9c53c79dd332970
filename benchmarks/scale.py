"""What a manifest costs a worker at any size, and what 10^9 images would take.

    python benchmarks/scale.py --rows 1000000 10000000         start-up, memory, rows per second
    python benchmarks/scale.py --images-per-s 253 --gpus 64    the arithmetic for 10^9 images

The rows are synthetic: names are all different, images are a few small pictures. Each figure is that of a new
process, as it would start on a cluster. "First image" is the time from its start until the first batch of one
part is scored; memory is what the process needs above the model's until the whole part is listed (peak of
resident memory). A CSV of the same rows is read for comparison, where it has at most a million.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scenes import fitted, synthetic_scene
from featdistill import command_line
from featdistill.atomic import write_json
from featdistill.command_line import Parser, within
from featdistill.images.reading import encode_jpeg
from featdistill.records.manifest import read_manifest
from featdistill.records.parts import Parts, part_name, table_bytes
from featdistill.storage import Folder
from featdistill.text_tables import table

_CSV_ROWS = 1_000_000
_PICTURES = 8
_BILLION = 10**9


def build_parser() -> Parser:
    parser = Parser(description="Cost of a manifest by its number of rows.")
    parser.add_argument("--rows", nargs="+", type=within(1), default=[100_000, 1_000_000], metavar="N")
    parser.add_argument("--rows-per-part", type=within(1), default=100_000, metavar="N")
    parser.add_argument("--repeats", type=within(1), default=3, help="new processes per figure")
    parser.add_argument("--folder", metavar="DIR", help="keep the rows here, for another run")
    positive = within(0, kind=float, exclusive=True)
    parser.add_argument(
        "--images-per-s", type=positive, help="of one GPU: print the arithmetic for 10^9 images"
    )
    parser.add_argument("--gpus", type=within(1), default=1, help="for the arithmetic")
    parser.add_argument("--out", metavar="FILE", help="save the figures as JSON")
    parser.add_argument("--worker", nargs=2, metavar=("PARTS", "EXPERT"), help="used by the benchmark itself")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.worker:
        parts, expert = arguments.worker
        return worker(parts, expert) if expert else csv_worker(parts)
    if arguments.images_per_s:
        print(arithmetic(arguments.images_per_s, arguments.gpus, arguments.rows_per_part))
        return 0
    from featdistill.models.expert import create_expert, save_expert

    report = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        save_expert(create_expert("tiny_clip", "random", input_size=48).eval(), folder / "expert")
        for rows in arguments.rows:
            parts = synthetic_parts(folder, rows, arguments.rows_per_part)
            report.append({"rows": rows} | measure(parts, folder / "expert", arguments.repeats))
            if rows <= _CSV_ROWS:
                report[-1] |= measure_csv(parts, folder / "all.csv")
            print(_shown(report[-1]), flush=True)
    if arguments.out:
        write_json(arguments.out, report)
    return 0


def synthetic_parts(folder: Path, rows: int, rows_per_part: int) -> Path:
    """Write a manifest in parts, unless it is there already."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for number in range(_PICTURES):
        small = fitted(synthetic_scene(number), (320, 240))
        (pictures / f"{number}.jpg").write_bytes(encode_jpeg(small, 90))
    out = Folder(folder / f"rows-{rows}-{rows_per_part}")
    existing = set(out.names())
    for part, start in enumerate(range(0, rows, rows_per_part)):
        if part_name(part) in existing:
            continue
        numbers = range(start, min(start + rows_per_part, rows))
        columns = {
            "image": [f"../pictures/{number % _PICTURES}.jpg" for number in numbers],
            "name": [f"{number // 1000:06d}/{number:010d}.jpg" for number in numbers],
            "source": ["platform"] * len(numbers),
        }
        out.write(part_name(part), table_bytes(columns))
    return Path(out.address)


def measure(parts: Path, expert: Path, repeats: int) -> dict[str, float]:
    """Return the medians over new processes of what `worker` prints, and of the seconds until it does."""
    figures = []
    for _ in range(repeats):
        start = time.time()
        command = [sys.executable, __file__, "--worker", str(parts), str(expert)]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        figures.append({"first_image_s": found.pop("first_image_at") - start} | found)
    return {key: statistics.median(figure[key] for figure in figures) for key in figures[0]}


def worker(parts: str, expert: str) -> int:
    """Score as a worker of `predict.py` does until the first batch is done, and print when that was."""
    from featdistill.inference import parts as scoring
    from featdistill.inference.predictor import load_ensemble

    predictor = load_ensemble([expert], device="cpu", workers=0)
    before_mib, score_dataset = start_peak(), scoring.score_dataset

    def first_batch(*args, **kwargs):
        yield next(iter(score_dataset(*args, **kwargs)))
        found = {"first_image_at": time.time(), "manifest_mib": peak_mib() - before_mib}
        print(json.dumps(found | {"model_mib": before_mib}), flush=True)
        raise KeyboardInterrupt

    scoring.score_dataset = first_batch
    with tempfile.TemporaryDirectory() as out:
        try:
            scoring.score_parts(predictor, parts, out, show=False)
        except KeyboardInterrupt:
            return 0
    return 1


def measure_csv(parts: Path, path: Path) -> dict[str, float]:
    """Return the seconds and the memory that the same rows take as a CSV, read whole."""
    frames = [Parts(parts).read(name)[0] for name in Parts(parts).names]
    pd.concat(frames).to_csv(path, index=False)
    command = [sys.executable, __file__, "--worker", str(path), ""]
    seconds, mib = map(
        float, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    )
    return {"csv_s": seconds, "csv_mib": mib}


def csv_worker(path: str) -> int:
    """Read a manifest whole, and print the seconds and the memory that it took."""
    start, before_mib = time.time(), start_peak()
    rows = read_manifest(path)
    print(time.time() - start, peak_mib() - before_mib, flush=True)
    return int(rows.empty)


def start_peak() -> float:
    """Return the resident memory of this process in MiB, and forget the largest so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def peak_mib() -> float:
    """Return the largest resident memory since `start_peak`, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def arithmetic(images_per_s: float, gpus: int, rows_per_part: int) -> str:
    """Return what 10^9 images take, as a table."""
    sample = {
        "name": [f"{number // 1000:06d}/{number:010d}.jpg" for number in range(rows_per_part)],
        "score": np.random.default_rng(0).random(rows_per_part),
        "expert": np.random.default_rng(1).random(rows_per_part),
    }
    gigabytes = len(table_bytes(sample)) / rows_per_part * _BILLION / 1e9
    days = _BILLION / images_per_s / 86_400
    rows = [
        ("parts", f"{_BILLION // rows_per_part:,}"),
        ("time of a part on one GPU", f"{rows_per_part / images_per_s / 60:.1f} min"),
        ("GPU days", f"{days:.0f}"),
        (f"on {gpus} GPUs", f"{days / gpus:.1f} days"),
        ("lost by killing a worker, at most", f"{rows_per_part / images_per_s / 60:.1f} GPU minutes"),
        ("scores of one expert", f"{gigabytes:.0f} GB"),
        ("reading images of 200 kB", f"{200e3 * images_per_s * gpus / 1e9:.2f} GB/s over all GPUs"),
    ]
    return table(("10^9 images", f"{images_per_s:g} images/s per GPU"), rows)


def _shown(row: dict) -> str:
    text = f"{row['rows']:,} rows: first image after {row['first_image_s']:.1f} s, "
    text += f"manifest {row['manifest_mib']:.0f} MiB (model and libraries {row['model_mib']:.0f} MiB)"
    as_csv = f"; as CSV {row['csv_s']:.1f} s and {row['csv_mib']:.0f} MiB" if "csv_s" in row else ""
    return text + as_csv


if __name__ == "__main__":
    command_line.run(main)
