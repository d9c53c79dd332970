"""Do training runs finish on this device, with everything that a CPU cannot try?"""

import json
import logging
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from torch import nn

import distill
import train
from benchmarks.device_checks.runner import Bench, Part, Skip
from benchmarks.scenes import fitted, synthetic_scene
from data_prep.synthetic.camera import encode_jpeg
from featdistill.records.manifest import make_manifest, write_manifest
from featdistill.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
# A few steps of a tiny transformer.
_RUN = ["--recipe", "demo_clip_a", "--batch-size", "8", "--epochs", "2", "--workers", "0", "--log-every", "1"]
_STAGE_1 = ["--input-size", "32"]
# Without dropout and BatchNorm, so that processes take the steps of a single one.
_PLAIN = [
    "--backbone",
    "timm:test_vit",
    "--head-dropout",
    "0",
    "--precision",
    "fp32",
    "--learning-rate",
    "1e-4",
]
_PROCESS_TIMEOUT_S = 120


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


def data_flags(bench: Bench) -> list[str]:
    """Return `--train` and `--val` of small labeled sets, written once."""
    flags = []
    for name, count, first in (("train", 32, 0), ("val", 8, 100)):
        folder = bench.folder / name
        manifest = folder / "manifest.csv"
        if not manifest.is_file():
            folder.mkdir()
            for number in range(count):
                picture = fitted(synthetic_scene((first + number) % 16), (96 + number, 96))
                (folder / f"{number}.jpg").write_bytes(encode_jpeg(picture, 95))
            names = [f"{number}.jpg" for number in range(count)]
            labels = [number % 2 for number in range(count)]
            write_manifest(make_manifest({"image": names, "name": names, "label": labels}), manifest)
        flags += [f"--{name}", str(manifest)]
    return flags


def run(bench: Bench, name: str, *flags: str, teacher: Path | None = None) -> Path:
    """Train in this process and return the folder of the run, which must have ended well."""
    out = bench.folder / name
    AcceleratorState._reset_state()
    arguments = [*_RUN, *data_flags(bench), "--out", str(out), *flags]
    arguments += ["--teacher", str(teacher / "expert")] if teacher else _STAGE_1
    compile_in_place = nn.Module.compile
    compiled = mock.patch.object(nn.Module, "compile", lambda part: compile_in_place(part, **bench.compiler))
    logger = logging.getLogger("featdistill")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with compiled:
            status = (distill if teacher else train).main(arguments)
    finally:
        logger.setLevel(level)
    if status:
        raise AssertionError(f"the run {name} ended with status {status}")
    return out


def losses(folder: Path) -> list[float]:
    """Return the losses of a run's steps; they must be finite."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if "loss" in line]
    if not found or not all(map(math.isfinite, found)):
        raise AssertionError(f"the losses of {folder.name} are {found}")
    return found


def difference(one: Path, other: Path) -> float:
    """Return the largest difference between the last weights of two runs."""
    states = [safetensors.torch.load_file(run / "expert-last/expert.safetensors") for run in (one, other)]
    pairs = ((value, states[1][name]) for name, value in states[0].items())
    return max(float((left.double() - right.double()).abs().max()) for left, right in pairs)


def stage_1(bench: Bench) -> dict[str, Any]:
    found = losses(run(bench, "s1", "--precision", bench.half, "--accumulation", "2"))
    return {"precision": bench.half, "first loss": found[0], "last": found[-1]}


def stage_2(bench: Bench) -> dict[str, Any]:
    flags = ["--objective", "dense+crd", "--precision", bench.half]
    found = losses(run(bench, "s2", *flags, teacher=_teacher(bench)))
    return {"precision": bench.half, "first loss": found[0], "last": found[-1]}


def stage_1_compiled(bench: Bench) -> dict[str, Any]:
    flags = ["--precision", "bf16", "--compile", "--gradient-checkpointing", "--ema", "0.9"]
    found = losses(run(bench, "s1-compiled", *flags, "--consistency-weight", "0.5"))
    return {"first loss": found[0], "last": found[-1]}


def stage_2_compiled(bench: Bench) -> dict[str, Any]:
    flags = ["--precision", "bf16", "--compile", "--mask", "texture", "--mask-level", "token"]
    found = losses(run(bench, "s2-compiled", *flags, teacher=_teacher(bench)))
    return {"first loss": found[0], "last": found[-1]}


def lora(bench: Bench) -> dict[str, Any]:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise Skip("peft is not installed") from None
    flags = ["--finetune", "lora", "--lora-rank", "4", "--precision", bench.half]
    return {"last loss": losses(run(bench, "lora", *flags))[-1]}


def resumed(bench: Bench) -> dict[str, Any]:
    """A run that is killed after its third step must end with the weights of an undisturbed one."""
    flags = ["--precision", bench.half, "--checkpoint-every-s", "0"]
    whole, take_step = run(bench, "whole", *flags), Trainer._step

    def die(trainer: Trainer, stream: Iterator[dict]) -> None:
        take_step(trainer, stream)
        if trainer.step == 4:
            raise Killed

    try:
        with mock.patch.object(Trainer, "_step", die):
            run(bench, "killed", *flags)
    except Killed:
        pass
    moved = difference(whole, run(bench, "killed", *flags))
    # Kernels that add in any order change last bits, which Adam enlarges.
    if not moved <= (1e-3 if bench.is_gpu else 0):
        raise AssertionError(f"the weights of a run that was killed and continued differ by {moved:.3g}")
    return {"precision": bench.half, "largest difference of a weight": moved}


def skipped_steps(bench: Bench) -> dict[str, Any]:
    """A scale of the loss that overflows: steps are skipped until it fits, and the run goes on."""
    bench.need_gpu()
    prepare = Trainer._prepare

    def enlarge(trainer: Trainer, state: dict | None) -> None:
        prepare(trainer, state)
        trainer.accelerator.scaler._init_scale = 2.0**32

    with mock.patch.object(Trainer, "_prepare", enlarge):
        folder = run(bench, "overflow", "--precision", "fp16", "--epochs", "8")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    skipped = sum(line.get("skipped", 0) for line in lines)
    if not skipped:
        raise AssertionError("no step was skipped at a loss scale of 2^32")
    return {"skipped": skipped, "last loss": losses(folder)[-1]}


def several_processes(bench: Bench) -> dict[str, Any]:
    """The same steps in one process and in several, with NCCL or, on a CPU, gloo."""
    world = min(2, torch.cuda.device_count()) if bench.is_gpu else 2
    return {"processes": world} | _in_processes(bench, "ddp", world, {})


def sharded(version: int, bench: Bench) -> dict[str, Any]:
    bench.need_gpu()
    world = min(2, torch.cuda.device_count())
    settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(version)}
    return {"processes": world} | _in_processes(bench, f"fsdp{version}", world, settings)


def _teacher(bench: Bench) -> Path:
    return run(bench, "teacher", "--precision", "fp32", "--epochs", "1")


def _in_processes(bench: Bench, name: str, world: int, settings: dict[str, str]) -> dict[str, Any]:
    """Compare the losses of a run in other processes with those in this one."""
    expected = losses(run(bench, "one-process", *_PLAIN))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = [*_STAGE_1, *_RUN, *data_flags(bench), *_PLAIN, "--out", str(bench.folder / name)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
    launch += ["--master_addr", "127.0.0.1", "--master_port", port, str(ROOT / "train.py")]
    with _killed_after(_PROCESS_TIMEOUT_S, [*launch, *flags], os.environ | settings) as (status, output):
        if status:
            raise AssertionError(f"status {status}: {output[-300:].strip()}")
    moved = max(abs(a - b) for a, b in zip(losses(bench.folder / name), expected, strict=True))
    if not moved <= 1e-3:
        raise AssertionError(f"losses differ from those of one process by {moved:.3g}")
    return {"largest difference of a loss": moved}


@contextmanager
def _killed_after(seconds: float, command: list[str], environment: dict) -> Iterator[tuple[int, str]]:
    """Run a command, which is told to end when its time is over."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        yield process.returncode, output
    finally:
        if process.poll() is None:
            # The launcher stops the processes that it has started.
            process.terminate()
            process.wait()


PARTS = [
    Part("stage 1 in half precision, with accumulation", 10, stage_1, shares=True),
    Part("stage 2, dense and contrastive, in half precision", 10, stage_2, shares=True),
    Part("a killed run continues to the same weights", 10, resumed, shares=True),
    Part("steps that overflow are skipped", 8, skipped_steps, shares=True),
    Part("stage 1 compiled, checkpointing, average, consistency", 45, stage_1_compiled, shares=True),
    Part("stage 2 compiled, token masking", 45, stage_2_compiled, shares=True),
    Part("LoRA", 8, lora, shares=True),
    Part("several processes", 30, several_processes, shares=True),
    Part("FSDP 2", 30, lambda bench: sharded(2, bench), shares=True),
    Part("FSDP 1", 30, lambda bench: sharded(1, bench), shares=True),
]
