"""One training loop for both stages, on accelerate.

What differs between the stages is a task: a module whose forward takes a batch and returns a dict with
`loss`. The loop can be killed at any moment: it continues from its last checkpoint and ends with the same
weights.
"""

import importlib.util
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from featdistill import metrics
from featdistill.command_line import UserError, progress
from featdistill.dataset import TrainBatches, TrainDataset, make_loader
from featdistill.distortion_presets import PRESETS
from featdistill.ensemble import score
from featdistill.equalise import read_settings
from featdistill.experts import Expert, save_expert
from featdistill.recipes import Recipe
from featdistill.run_folder import RunFolder

# Hold-out rows that are all clean are scored a second time under these distortions, drawn from (0, name).
_HOLDOUT_POLICY = PRESETS["official"]


def learning_rate_factor(step: int, total: int, warmup: float, final: float) -> float:
    """Return the learning rate at a step relative to its peak: linear warm-up, then a cosine to `final`.

    Args:
        step: optimiser steps done, 0 .. total - 1.
        warmup: share of the steps that warm up.
        final: value that the cosine ends at.
    """
    warm_steps = math.ceil(warmup * total)
    if step < warm_steps:
        return (step + 1) / warm_steps
    done = (step - warm_steps) / max(1, total - warm_steps)
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


def parameter_groups(expert: Expert, recipe: Recipe) -> list[dict[str, Any]]:
    """Return AdamW's groups: the head learns faster; norms, biases and position tables do not decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in expert.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not name.endswith(("pos_embed", "cls_token", "latent"))
            groups.setdefault((name.startswith("head."), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "peak_learning_rate": recipe.learning_rate * (recipe.head_learning_rate_factor if is_head else 1),
            "weight_decay": recipe.weight_decay if decays else 0.0,
        }
        for (is_head, decays), parameters in groups.items()
    ]


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Start the processes' common ground.

    Raises:
        UserError: the precision is not to be had on this hardware.
    """
    if recipe.precision == "fp16" and PartialState().device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; give --precision bf16 or fp32")
    return Accelerator(mixed_precision="no" if recipe.precision == "fp32" else recipe.precision)


class Trainer:
    """Trains a task to the end of its recipe, from the run folder's last checkpoint if there is one.

    Args:
        task: has `expert`, `checkpoint()` and `load_checkpoint()` beside its forward (see `tasks`).
        holdout: labelled rows; clean and robust AUC are taken on them after each epoch.
        card: what is written into the expert's card beside its metrics.
    """

    def __init__(
        self,
        task: nn.Module,
        dataset: TrainDataset,
        holdout: pd.DataFrame,
        recipe: Recipe,
        run: RunFolder,
        accelerator: Accelerator,
        card: dict[str, Any],
    ) -> None:
        self.task, self.expert, self.dataset, self.holdout = task, task.expert, dataset, holdout
        self.recipe, self.run, self.accelerator, self.card = recipe, run, accelerator, card
        self.step, self.scored_epochs, self.best = 0, 0, -1.0
        self.broken: list[tuple[str, str]] = []
        self.log = TrainingLog(run, accelerator)
        self.batches = TrainBatches(
            len(dataset),
            recipe.batch_size,
            recipe.epochs,
            recipe.seed,
            accumulation=recipe.accumulation,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            weights=dataset.weights,
        )

    def fit(self) -> None:
        """Train; do nothing where the run is finished."""
        state = self.run.load_state()
        if state and state["scored_epochs"] == self.recipe.epochs:
            self.accelerator.print(f"{self.run.path} is finished; nothing to do")
            return
        self._prepare(state)
        self.batches.start = self.step
        stream = iter(make_loader(self.dataset, self.batches, self.recipe.workers))
        saved_at = time.monotonic()
        while self.scored_epochs < self.recipe.epochs:
            # A run killed between the last step of an epoch and its scores still owes the scores.
            if self.step < (self.scored_epochs + 1) * self.batches.steps_per_epoch:
                self._train_epoch(stream, saved_at)
            self.log.write(self.step, self.scored_epochs)
            self._score_epoch()
            saved_at = time.monotonic()
        self.accelerator.wait_for_everyone()

    def _prepare(self, state: dict[str, Any] | None) -> None:
        """Put model and optimiser on the device, in the state of the last checkpoint."""
        fused = self.accelerator.device.type == "cuda"
        optimizer = torch.optim.AdamW(parameter_groups(self.expert, self.recipe), fused=fused)
        if state:
            self.task.load_checkpoint(state["task"])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.scored_epochs, self.best = state["step"], state["scored_epochs"], state["best"]
            self.accelerator.print(f"continuing {self.run.path} at step {self.step} of {self.batches.end}")
        self.wrapped, self.optimizer = self.accelerator.prepare(self.task, optimizer)
        if state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.accelerator.is_main_process:
            self.run.cut_log(state["log_bytes"] if state else 0)
        if state:
            self.log.restore(state["log"])

    def _train_epoch(self, stream: Iterator[dict], saved_at: float) -> None:
        """Take the steps that are left of the current epoch."""
        recipe, epoch = self.recipe, self.scored_epochs
        end = (epoch + 1) * self.batches.steps_per_epoch
        done = (self.step - epoch * self.batches.steps_per_epoch) * recipe.batch_size
        images = self.batches.steps_per_epoch * recipe.batch_size
        title = f"epoch {epoch + 1}/{recipe.epochs}"
        with progress(images, title, initial=done, show=self.accelerator.is_main_process) as bar:
            while self.step < end:
                self._step(stream)
                bar.update(recipe.batch_size)
                if self.step % recipe.log_every == 0:
                    bar.set_postfix(self.log.write(self.step, epoch), refresh=False)
                if time.monotonic() - saved_at >= recipe.checkpoint_every_s:
                    self._save()
                    saved_at = time.monotonic()

    def _step(self, stream: Iterator[dict]) -> None:
        """Take one optimiser step."""
        recipe, accelerator = self.recipe, self.accelerator
        factor = learning_rate_factor(self.step, self.batches.end, recipe.warmup, recipe.final_learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] * factor
        self.wrapped.train()
        for part in range(recipe.accumulation):
            batch = self._next_batch(stream)
            # What dropout draws is a function of the step, so that a continued run draws the same.
            place = (self.step * recipe.accumulation + part) * self.batches.world + self.batches.rank
            torch.manual_seed(int(np.random.SeedSequence((recipe.seed, place)).generate_state(1)[0]))
            last = part == recipe.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                output = self.wrapped(batch)
                accelerator.backward(output["loss"] / recipe.accumulation)
            self.log.add(output, recipe.batch_size / recipe.accumulation)
        if recipe.clip_norm:
            accelerator.clip_grad_norm_(self.expert.parameters(), recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.log.learning_rate = recipe.learning_rate * factor

    def _next_batch(self, stream: Iterator[dict]) -> dict[str, Tensor]:
        started = time.monotonic()
        batch = next(stream)
        self.log.waited_s += time.monotonic() - started
        self.broken += [(self.dataset.images[row.index], row.reason) for row in batch.pop("broken")]
        if "images" not in batch:
            raise UserError(
                f"no image of a whole batch can be read; the last is {': '.join(self.broken[-1])}"
            )
        return {key: value.to(self.accelerator.device, non_blocking=True) for key, value in batch.items()}

    def _score_epoch(self) -> None:
        """Score the hold-out, keep the expert if it is the best so far, and write a checkpoint."""
        found = score_holdout(self.expert, self.holdout, self.recipe, self.accelerator)
        value = found["clean_auc"] if found["robust_auc"] is None else found["robust_auc"]
        is_best = self.scored_epochs == 0 or (value is not None and value > self.best)
        if is_best and value is not None:
            self.best = value
        self.scored_epochs += 1
        unreadable = gather_object(self.broken)
        if self.accelerator.is_main_process:
            self.log.epoch(self.step, self.scored_epochs, self.recipe.epochs, found, is_best)
            card = self.card | {"epoch": self.scored_epochs, "metrics": {"holdout": found}}
            for folder in (self.run.expert_last, self.run.expert) if is_best else (self.run.expert_last,):
                save_expert(self.expert, folder, card)
            if unreadable:
                self.run.add_unreadable(unreadable)
        self._save()

    def _save(self) -> None:
        """Write a checkpoint. A finished run only needs to say so: its weights are in the expert's folder."""
        if not self.accelerator.is_main_process:
            return
        finished = self.scored_epochs == self.recipe.epochs
        scaler = self.accelerator.scaler
        self.run.save_state(
            {
                "task": None if finished else self.task.checkpoint(),
                "optimizer": None if finished else self.optimizer.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "step": self.step,
                "scored_epochs": self.scored_epochs,
                "best": self.best,
                "log": self.log.state(),
            }
        )


class TrainingLog:
    """Mean losses between two lines, for `metrics.jsonl`, and for TensorBoard where it is installed."""

    def __init__(self, run: RunFolder, accelerator: Accelerator) -> None:
        self.run, self.accelerator = run, accelerator
        self.learning_rate, self.waited_s = 0.0, 0.0
        self.board = None
        self._clear()

    def state(self) -> dict[str, Any]:
        """Return what has been added since the last line."""
        return {"sums": {key: float(value) for key, value in self.sums.items()}, "parts": self.parts}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned, so that the next line is that of an undisturbed run."""
        device = self.accelerator.device
        self.sums = {key: torch.tensor(value, device=device) for key, value in state["sums"].items()}
        self.parts = state["parts"]

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.parts, self.images, self.waited_s, self.since = 0, 0.0, 0.0, time.monotonic()

    def add(self, output: dict[str, Tensor], images: float) -> None:
        """Add one forward pass; nothing is brought from the device."""
        for key, value in output.items():
            if value.ndim == 0:
                self.sums[key] = self.sums.get(key, 0) + value.detach().float()
        self.parts += 1
        self.images += images

    def write(self, step: int, epoch: int) -> dict[str, str]:
        """Write a line with the means since the last one, over all processes; return what the bar shows.

        Raises:
            UserError: the loss is no finite number.
        """
        if not self.parts:
            return {}
        keys = sorted(self.sums)
        means = self.accelerator.reduce(torch.stack([self.sums[key] for key in keys]), "mean") / self.parts
        losses = dict(zip(keys, means.tolist(), strict=True))
        took = time.monotonic() - self.since
        line = {"step": step, "epoch": epoch, **losses, "learning_rate": self.learning_rate}
        line |= {"images_per_s": round(self.images / took, 2), "data_wait": round(self.waited_s / took, 4)}
        self._clear()
        if not math.isfinite(losses["loss"]):
            raise UserError(f"the loss is {losses['loss']} at step {step}; lower --learning-rate or use fp32")
        if self.accelerator.is_main_process:
            self._emit(line)
        return {key: f"{value:.4f}" for key, value in losses.items()}

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

    def _emit(self, line: dict[str, Any]) -> None:
        self.run.log(line)
        if self.board is None and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.run.path / "tensorboard"))
        if self.board:
            for key, value in line.items():
                if isinstance(value, float):
                    self.board.add_scalar(key, value, line["step"])
            self.board.flush()


def score_holdout(
    expert: Expert, holdout: pd.DataFrame, recipe: Recipe, accelerator: Accelerator
) -> dict[str, Any]:
    """Return `images`, `clean_auc` and `robust_auc` of an expert; each process scores its part of the rows.

    Where no row is distorted, the rows are scored a second time under the official distortions.
    """
    is_distorted = (holdout["is_distorted"] == 1).fillna(False).to_numpy(dtype=bool)
    parts = [(holdout[~is_distorted], None), (holdout[is_distorted], None)]
    if not is_distorted.any():
        parts[1] = (holdout, _HOLDOUT_POLICY)
    expert.eval()
    auc = []
    for rows, policy in parts:
        rows = rows.reset_index(drop=True)
        batches = range(-(-len(rows) // recipe.score_batch_size))
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        scored = [
            (row, float(logit))
            for batch in score(
                [expert],
                rows,
                device=accelerator.device,
                batch_size=recipe.score_batch_size,
                workers=recipe.workers,
                precision=recipe.precision,
                policy=policy,
                equalisation=read_settings(recipe.equalise) if recipe.equalise else None,
                batches=mine,
            )
            for row, logit in zip(batch.rows, batch.logits[0], strict=True)
        ]
        scored = sorted(gather_object(scored))
        label = rows["label"].to_numpy(dtype=np.int64)[[row for row, _ in scored]]
        auc.append(metrics.roc_auc(label, np.array([logit for _, logit in scored])))
    return {"images": len(holdout), "clean_auc": auc[0], "robust_auc": auc[1]}


def _rounded(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"
