"""Small training runs and what they leave."""

import json
from pathlib import Path

import pytest

import train
from featdistill.training.trainer import Trainer

# Stage 2 gets its architecture, and with it the size of the input, from its teacher.
SMALL_STAGE_2 = ["--recipe", "demo_clip_a", "--batch-size", "8", "--epochs", "2", "--workers", "0"]
SMALL_STAGE_2 += ["--score-batch-size", "8", "--log-every", "1"]
SMALL = [*SMALL_STAGE_2, "--input-size", "32"]


def kill_at(step: int, arguments: list[str], run: Path) -> None:
    """Train, and interrupt the run before a step, counted from 0."""
    take = Trainer._step

    def die(trainer, stream):
        if trainer.step == step:
            raise KeyboardInterrupt
        take(trainer, stream)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", die)
        train.main([*arguments, "--out", str(run)])


def lines(run: Path) -> list[dict]:
    """Return the lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_line(run: Path) -> dict:
    return lines(run)[-1]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(run) if "loss" in line]


def weights(run: Path) -> bytes:
    return (run / "expert-last" / "expert.safetensors").read_bytes()
