"""How long does a training run take besides its steps?"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.device_checks.runner import Bench, Part
from benchmarks.device_checks.training_checks import ROOT, data_flags

_EPOCHS = 3
_REAL = ["--recipe", "clip_b16", "--weights", "random", "--workers", "4"]
_TINY = ["--recipe", "demo_clip_a", "--input-size", "32", "--workers", "1"]
_SECONDS_BETWEEN_LOOKS = 0.005


def start_up(bench: Bench) -> dict[str, Any]:
    """Time a run of three short epochs as its user sees it, in s.

    Everything counts from the command on: imports, the model (drawn at random, where a file would be read),
    the first batch. From the last step of an epoch to the first of the next one, the hold-out is scored and
    the expert is saved.
    """
    out = bench.folder / "start-up"
    flags = ["--batch-size", "8", "--epochs", str(_EPOCHS), "--log-every", "1", "--out", str(out)]
    flags = [*(_TINY if bench.tiny else _REAL), *data_flags(bench), *flags]
    environment = os.environ | ({} if bench.is_gpu else {"CUDA_VISIBLE_DEVICES": ""})
    lines, ended = _timed([sys.executable, "train.py", *flags], out / "metrics.jsonl", environment)
    steps = [(at, line["epoch"]) for at, line in lines if "loss" in line]
    pairs = list(itertools.pairwise(steps))
    between = [after - before for (before, epoch), (after, next_epoch) in pairs if epoch != next_epoch]
    within = [after - before for (before, epoch), (after, next_epoch) in pairs if epoch == next_epoch]
    if len(between) != _EPOCHS - 1:
        raise AssertionError(f"a run of {_EPOCHS} epochs has {len(between) + 1} in its log")
    return {
        "to the first step": steps[0][0],
        "between epochs": statistics.median(between),
        "a step": statistics.median(within),
        "after the last step": ended - steps[-1][0],
    }


def _timed(
    command: list[str], log: Path, environment: dict[str, str]
) -> tuple[list[tuple[float, dict[str, Any]]], float]:
    """Run a training command; return the lines of its log, each with its time, and the time of its end."""
    began, seen, output = time.monotonic(), [], log.parent.with_suffix(".log")
    with (
        output.open("w") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file) as process,
    ):
        try:
            is_running = True
            while is_running:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                is_running = process.poll() is None
                now = time.monotonic() - began
                text = log.read_text(encoding="utf-8") if log.is_file() else ""
                found = text[: text.rfind("\n") + 1].splitlines()
                seen += [(now, json.loads(line)) for line in found[len(seen) :]]
        finally:
            process.kill()
    if process.returncode:
        raise AssertionError(f"status {process.returncode}: {output.read_text()[-300:].strip()}")
    return seen, now


PARTS = [Part("start-up of a training run", 30, start_up)]
