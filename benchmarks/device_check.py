"""Does everything work on this GPU, and how fast? One command of under 8 minutes on an H100 or H200.

    python benchmarks/device_check.py --out device.json
    python benchmarks/device_check.py --only "training speed" --out more.json        parts by their titles
    python benchmarks/device_check.py --device cpu --tiny                            what a CPU can check

It needs nothing but the repository and its requirements: weights are random, images synthetic. Parts run in
order of importance: correctness, several at a time, while what is measured later is compiled; then speed and
memory, one after the other, and the authors' release. Each prints its line as soon as it is done. A part that
fails or crashes does not stop the others, and the status is then 1; a part that no longer fits into
`--minutes` is skipped, and its line says so.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

# As in predict.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Asking for a GPU must not begin to use it: parts run in processes that are forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.device_checks import scoring_checks, speed, start_up, training_checks
from benchmarks.device_checks.runner import Bench, run_parts
from featdistill import command_line
from featdistill.atomic import write_json
from featdistill.command_line import Parser, UserError, within
from featdistill.inference.compute import named_device
from featdistill.models.expert import versions
from featdistill.training.run_folder import git_commit

# The device and its rate of matrix products, to which all figures are compared.
FIRST = scoring_checks.FIRST
PARTS = sorted(
    [*speed.AHEAD, *scoring_checks.PARTS, *training_checks.PARTS, *speed.PARTS, *start_up.PARTS],
    key=lambda part: not part.shares,
)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_parser() -> Parser:
    parser = Parser(description="Check correctness, speed and memory on the GPU at hand.")
    parser.add_argument("--only", nargs="+", metavar="TITLE", help="parts whose titles contain one of these")
    parser.add_argument("--without", nargs="+", default=[], metavar="TITLE", help="leave out such parts")
    parser.add_argument(
        "--list", action="store_true", help="list the parts and the seconds that they should take"
    )
    positive = within(0, kind=float, exclusive=True)
    parser.add_argument("--minutes", type=positive, default=8, help="time for all of it (default: 8)")
    parser.add_argument(
        "--jobs",
        type=within(1),
        default=max(1, min(6, CORES // 3)),
        help="checks of correctness at a time (default: %(default)s)",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models and few steps, as for a CPU")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--out", metavar="FILE", help="save the results as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    parts = [
        part
        for part in PARTS
        if any(title in part.name for title in arguments.only or [""])
        and not any(title in part.name for title in arguments.without)
    ]
    if not parts:
        raise UserError("no part has such a title; --list shows them")
    if arguments.list:
        for part in [FIRST, *parts]:
            print(f"{part.seconds:4.0f} s  {part.name}{' (always)' if part is FIRST else ''}")
        return 0
    device = named_device(arguments.device)
    if device.type == "cpu" and not arguments.tiny:
        raise UserError("without a GPU, use --tiny: the paper's experts would take hours")
    out = Path(arguments.out) if arguments.out else None
    if out and out.exists():
        raise UserError(f"{out} already exists; choose another --out, or remove it")
    # As an interrupt does, it ends the parts, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, arguments.tiny, Path(folder), {"versions": versions(), "commit": git_commit()})
        print(", ".join(f"{key} {value}" for key, value in bench.facts.items()), flush=True)
        if out:
            write_json(out, bench.facts)
        start = time.monotonic()
        try:
            results = run_parts([FIRST], bench, arguments.minutes, out)
            if results[0]["status"] == "FAILED":
                return 1
            left = arguments.minutes - (time.monotonic() - start) / 60
            results = run_parts(parts, bench, left, out, arguments.jobs, results)
        except KeyboardInterrupt:
            print("interrupted" + (f"; what was done is in {out}" if out else ""), file=sys.stderr)
            return 130
    counts = {
        status: sum(one["status"] == status for one in results) for status in ("ok", "skipped", "FAILED")
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    command_line.run(main)
