"""Progress of training: the numbers of the progress bar, `metrics.jsonl`, and accelerate's trackers."""

import dataclasses
import logging
import math
import time
from collections import Counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor

from featdistill.command_line import UserError, one_of
from featdistill.training.recipe import Recipe
from featdistill.training.run_folder import RunFolder

TRACKERS = ("tensorboard", "wandb", "trackio")
_log = logging.getLogger(__name__)


def tracker_names(trackers: str | None) -> list[str]:
    """Return the names in a recipe's `trackers`, checked.

    Raises:
        UserError: one is unknown (the nearest one is named) or not installed.
    """
    names = [name.strip() for name in (trackers or "").split(",") if name.strip()]
    for name in names:
        if one_of("tracker", name, TRACKERS) not in map(str, get_available_trackers()):
            raise UserError(f"tracker {name} is not installed; run pip install -U accelerate {name}")
    return names


def start_trackers(accelerator: Accelerator, recipe: Recipe, run: RunFolder) -> None:
    """Start the accelerator's trackers; a continued run continues in the same place."""
    name = run.path.name
    accelerator.init_trackers(
        "featdistill",
        config={key: str(value) for key, value in dataclasses.asdict(recipe).items()},
        init_kwargs={
            "wandb": {"name": name, "id": name, "dir": str(run.path), "resume": "allow"},
            "trackio": {"name": name, "resume": "allow"},
        },
    )


class TrainingLog:
    """Means between two lines: losses over the steps that were taken, times over all steps."""

    def __init__(self, run: RunFolder, accelerator: Accelerator) -> None:
        self.run, self.accelerator = run, accelerator
        self.learning_rate = 0.0
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        # Of `passes`, `steps`, `skipped` steps and the sum of `gradient_norm`.
        self.counts: Counter[str] = Counter()
        self.start_clock()

    def start_clock(self) -> None:
        """Exclude the time since the last line from the rates: it was not spent on training."""
        self.images, self.waited_s, self.since = 0, 0.0, time.monotonic()

    def state(self) -> dict[str, Any]:
        """Return what was added since the last line."""
        sums = {key: float(value) for key, value in self.sums.items()}
        return {"sums": sums, "counts": dict(self.counts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned, so that the next line is that of an undisturbed run."""
        device = self.accelerator.device
        self.sums = {key: torch.tensor(value, device=device) for key, value in state["sums"].items()}
        self.counts = Counter(state["counts"])

    def add(self, outputs: list[dict[str, Tensor]], gradient_norm: float) -> None:
        """Add a step with the outputs of its forward passes, without waiting for the device."""
        for output in outputs:
            for key, value in output.items():
                if value.ndim == 0:
                    self.sums[key] = self.sums.get(key, 0) + value.detach().float()
        self.counts.update(passes=len(outputs), steps=1, gradient_norm=gradient_norm)

    def add_skipped(self) -> None:
        """Add a step that was left out."""
        self.counts["skipped"] += 1

    def write(self, step: int, epoch: int) -> dict[str, str]:
        """Write a line of means since the last one, over all processes; return what the bar shows."""
        steps, skipped = self.counts["steps"], self.counts["skipped"]
        if not steps + skipped:
            return {}
        losses: dict[str, float] = {}
        if steps:
            keys = sorted(self.sums)
            sums = torch.stack([self.sums[key] for key in keys])
            means = (self.accelerator.reduce(sums, "mean") / self.counts["passes"]).tolist()
            losses = dict(zip(keys, means, strict=True))
        elapsed_s = max(time.monotonic() - self.since, 1e-9)
        data_wait = round(self.waited_s / elapsed_s, 4)
        line: dict[str, Any] = {"step": step, "epoch": epoch, **losses, "learning_rate": self.learning_rate}
        line |= {"images_per_s": round(self.images / elapsed_s, 2), "data_wait": data_wait}
        if steps:
            line["gradient_norm"] = self.counts["gradient_norm"] / steps
        line["skipped"] = skipped
        shown = {key: f"{value:.4f}" for key, value in losses.items()}
        shown |= {"lr": f"{self.learning_rate:.1e}", "wait": f"{data_wait:.0%}"}
        device = self.accelerator.device
        if device.type == "cuda":
            line["memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
            shown["GiB"] = f"{line['memory_gib']:.1f}"
        shown |= {"skipped": str(skipped)} if skipped else {}
        self._clear()
        self._emit(line)
        return shown

    def epoch(self, step: int, epoch: int, epochs: int, holdout: dict[str, Any], is_best: bool) -> None:
        """Write and show the line of an epoch."""
        self._emit({"step": step, "epoch": epoch} | {f"holdout_{key}": holdout[key] for key in holdout})
        clean, robust = (
            "not defined" if holdout[key] is None else f"{holdout[key]:.4f}"
            for key in ("clean_auc", "robust_auc")
        )
        _log.info(
            f"epoch {epoch}/{epochs}: hold-out clean auc {clean}, robust auc {robust} on {holdout['images']} "
            "images" + (" (best so far)" if is_best else "")
        )

    def _emit(self, line: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        # JSON has no NaN and no infinity.
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        self.run.log(line)
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=numbers.pop("step"))
