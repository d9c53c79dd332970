"""How training goes: the bar's numbers, `metrics.jsonl`, and the trackers that accelerate knows."""

import dataclasses
import importlib.util
import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from torch import Tensor

from featdistill.command_line import UserError, one_of
from featdistill.training.recipe import Recipe
from featdistill.training.run_folder import RunFolder

TRACKERS = ("tensorboard", "wandb", "trackio")
_PROJECT = "featdistill"


def tracker_names(trackers: str | None) -> list[str]:
    """Return the trackers of a recipe's `trackers`, checked.

    Raises:
        UserError: one is unknown (the nearest one is named) or not installed.
    """
    names = [name.strip() for name in (trackers or "").split(",") if name.strip()]
    for name in names:
        one_of("tracker", name, TRACKERS)
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracker {name} is not installed; run pip install {name}, or leave it out")
        if name not in LoggerType.list():
            raise UserError(f"this version of accelerate knows no {name}; run pip install -U accelerate")
    return names


def start_trackers(accelerator: Accelerator, recipe: Recipe, run: RunFolder) -> None:
    """Start the trackers that the accelerator was made with; a continued run goes on in the same place."""
    settings = {key: str(value) for key, value in dataclasses.asdict(recipe).items()}
    name = run.path.name
    accelerator.init_trackers(
        _PROJECT,
        config=settings,
        init_kwargs={
            "wandb": {"name": name, "id": name, "dir": str(run.path), "resume": "allow"},
            "trackio": {"name": name, "resume": "allow"},
        },
    )


class TrainingLog:
    """Means between two lines: losses over the steps that were taken, times over all."""

    def __init__(self, run: RunFolder, accelerator: Accelerator) -> None:
        self.run, self.accelerator = run, accelerator
        self.learning_rate = 0.0
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.parts, self.steps, self.skipped, self.gradient_norm = 0, 0, 0, 0.0
        self.start_clock()

    def start_clock(self) -> None:
        """Leave the time since the last line out of the rates: it was not spent on training."""
        self.images, self.waited_s, self.since = 0, 0.0, time.monotonic()

    def state(self) -> dict[str, Any]:
        """Return what has been added since the last line."""
        counts = {key: getattr(self, key) for key in ("parts", "steps", "skipped", "gradient_norm")}
        return {"sums": {key: float(value) for key, value in self.sums.items()}, **counts}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned, so that the next line is that of an undisturbed run."""
        device = self.accelerator.device
        self.sums = {key: torch.tensor(value, device=device) for key, value in state["sums"].items()}
        for key in ("parts", "steps", "skipped", "gradient_norm"):
            setattr(self, key, state[key])

    def take(self, outputs: list[dict[str, Tensor]], gradient_norm: float) -> None:
        """Add a step that was taken, by the outputs of its forward passes; nothing comes from the device."""
        for output in outputs:
            for key, value in output.items():
                if value.ndim == 0:
                    self.sums[key] = self.sums.get(key, 0) + value.detach().float()
        self.parts += len(outputs)
        self.steps += 1
        self.gradient_norm += gradient_norm

    def skip(self) -> None:
        """Add a step that was not taken."""
        self.skipped += 1

    def write(self, step: int, epoch: int) -> dict[str, str]:
        """Write a line with the means since the last one, over all processes; return what the bar shows."""
        if not self.steps + self.skipped:
            return {}
        losses: dict[str, float] = {}
        if self.parts:
            keys = sorted(self.sums)
            sums = torch.stack([self.sums[key] for key in keys])
            means = (self.accelerator.reduce(sums, "mean") / self.parts).tolist()
            losses = dict(zip(keys, means, strict=True))
        took = max(time.monotonic() - self.since, 1e-9)
        line: dict[str, Any] = {"step": step, "epoch": epoch, **losses, "learning_rate": self.learning_rate}
        line |= {"images_per_s": round(self.images / took, 2), "data_wait": round(self.waited_s / took, 4)}
        if self.steps:
            line["gradient_norm"] = self.gradient_norm / self.steps
        line["skipped"] = self.skipped
        memory_gib = self._peak_memory_gib()
        if memory_gib is not None:
            line["memory_gib"] = memory_gib
        shown = {key: f"{value:.4f}" for key, value in losses.items()}
        shown |= {"lr": f"{self.learning_rate:.1e}", "wait": f"{line['data_wait']:.0%}"}
        shown |= {} if memory_gib is None else {"GiB": f"{memory_gib:.1f}"}
        shown |= {"skipped": str(self.skipped)} if self.skipped else {}
        self._clear()
        self._emit(line)
        return shown

    def epoch(self, step: int, epoch: int, epochs: int, holdout: dict[str, Any], is_best: bool) -> None:
        """Write and print the line of an epoch."""
        self._emit(
            {"step": step, "epoch": epoch, **{f"holdout_{key}": value for key, value in holdout.items()}}
        )
        shown = [f"{key.replace('_', ' ')} {_rounded(holdout[key])}" for key in ("clean_auc", "robust_auc")]
        self.accelerator.print(
            f"epoch {epoch}/{epochs}: hold-out {', '.join(shown)} on {holdout['images']} images"
            + (" (best so far)" if is_best else "")
        )

    def _peak_memory_gib(self) -> float | None:
        device = self.accelerator.device
        if device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)

    def _emit(self, line: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        # JSON has no word for what is not finite.
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        self.run.log(line)
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=numbers.pop("step"))


def _rounded(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"
