"""One training loop for both stages, on accelerate.

What differs between the stages is a task: a module whose forward takes a batch and returns a dict with
`loss`. The loop can be killed at any moment: it continues from its last checkpoint and ends with the same
weights. On SIGTERM it saves after the step under way and leaves.

Its shape on several processes: each takes its slice of every batch (`sampling.TrainBatches`), gradients are
averaged (DDP), the hold-out is dealt out by whole batches, and the main process alone writes.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
)
from torch import Tensor, nn

from featdistill.command_line import UserError, progress
from featdistill.data.loading import make_loader
from featdistill.data.sampling import TrainBatches
from featdistill.data.train_dataset import TrainDataset
from featdistill.models.expert import Expert, load_expert, save_expert
from featdistill.training import finetuning, sharding
from featdistill.training import optimizer as optimisation
from featdistill.training.holdout import score_holdout
from featdistill.training.log import TrainingLog, start_trackers, tracker_names
from featdistill.training.preemption import Preemption
from featdistill.training.recipe import Recipe
from featdistill.training.run_folder import RunFolder

# fp16 starts with its loss scaled by 2^16 and halves the scale at each overflow, which is no fault; after
# this many in a row the scale is not what is wrong.
_MOST_OVERFLOWS = 20
_MOST_WAITING = timedelta(hours=12)
# How often several processes ask each other whether to save or to leave, in optimiser steps.
_STEPS_BETWEEN_QUESTIONS = 10


def make_accelerator(recipe: Recipe, run: RunFolder) -> Accelerator:
    """Start the processes' common ground; nothing is written yet.

    Raises:
        UserError: the precision is not to be had on this hardware, or a tracker not here.
    """
    trackers = tracker_names(recipe.trackers)
    # A cache can take hours to make, while the other processes wait for the main one.
    patience = {"timeout": _MOST_WAITING} if recipe.cache else {}
    # Without a GPU, accelerate takes what torchrun starts for that many single processes, unless told.
    on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    if recipe.precision == "fp16" and PartialState(cpu=on_cpu, **patience).device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; give --precision bf16 or fp32")
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if recipe.precision == "fp32" else recipe.precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(logging_dir=str(run.path / "tensorboard")),
        kwargs_handlers=[InitProcessGroupKwargs(**patience)],
    )


class Trainer:
    """Trains a task to the end of its recipe, from the run folder's last checkpoint if there is one.

    Args:
        task: see `tasks`: has `expert` (trained), `evaluated` (scored and saved), `extra_parameters()`,
            `after_step()`, `after_skip()`, `checkpoint()` and `load_checkpoint()` beside its forward.
        holdout: labelled rows; clean and robust AUC are taken on them after each epoch.
        card: what is written into the expert's card beside its metrics.
        weights: (rows,) how often a row of the data set comes up in an epoch, or None: once.
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
        weights: np.ndarray | None = None,
    ) -> None:
        self.task, self.dataset, self.holdout = task, dataset, holdout
        self.recipe, self.run, self.accelerator, self.card = recipe, run, accelerator, card
        self.is_sharded = sharding.is_sharded(accelerator)
        self.step, self.scored_epochs, self.best = 0, 0, -1.0
        self.skipped_in_a_row = 0
        self.broken: list[tuple[str, str]] = []
        self.log = TrainingLog(run, accelerator)
        self.preemption = Preemption()
        self.batches = TrainBatches(
            len(dataset),
            recipe.batch_size,
            recipe.epochs,
            recipe.seed,
            accumulation=recipe.accumulation,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            weights=weights,
        )

    def fit(self) -> bool:
        """Train; do nothing where the run is finished. Return whether it is, or was asked to leave before."""
        state = self.run.load_state()
        if state and state["scored_epochs"] == self.recipe.epochs:
            self.accelerator.print(f"{self.run.path} is finished; nothing to do")
            return True
        with self.preemption:
            start_trackers(self.accelerator, self.recipe, self.run)
            self._prepare(state)
            self.batches.start = self.step
            stream = iter(make_loader(self.dataset, self.batches, self.recipe.workers))
            while self.scored_epochs < self.recipe.epochs:
                # A run killed between the last step of an epoch and its scores still owes the scores.
                if not self._train_epoch(stream):
                    self.accelerator.print(
                        f"stopped at step {self.step} of {self.batches.end}; the same command continues"
                    )
                    break
                self.log.write(self.step, self.scored_epochs)
                self._score_epoch()
            self.accelerator.wait_for_everyone()
        return self.scored_epochs == self.recipe.epochs

    def _prepare(self, state: dict[str, Any] | None) -> None:
        """Put model and optimiser on the device, in the state of the last checkpoint."""
        recipe, accelerator = self.recipe, self.accelerator
        if self.is_sharded and recipe.finetune == "lora":
            raise UserError(
                "finetune lora does not go with FSDP; give --finetune last_n, or launch without it"
            )
        finetuning.restrict(self.task.expert, recipe)
        if self.is_sharded:
            # FSDP takes no weights whose channels come last.
            self.task.to(memory_format=torch.contiguous_format)
        if recipe.gradient_checkpointing:
            self.task.expert.backbone.set_gradient_checkpointing(True)
        self.statistics = [
            buffer
            for part in self.task.expert.modules()
            if isinstance(part, nn.modules.batchnorm._BatchNorm)
            for buffer in part.buffers()
        ]
        # Statistics of BatchNorm drift apart between processes; the queue's buffers do not, and are large.
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            broadcast_buffers=bool(self.statistics), gradient_as_bucket_view=True
        )
        optimizer = optimisation.make_optimizer(self.task, recipe, accelerator.device)
        if state:
            if not self.is_sharded:
                self.task.load_checkpoint(state["task"])
                optimizer.load_state_dict(state["optimizer"])
            self.step, self.scored_epochs, self.best = state["step"], state["scored_epochs"], state["best"]
            self.skipped_in_a_row = state["skipped_in_a_row"]
            accelerator.print(f"continuing {self.run.path} at step {self.step} of {self.batches.end}")
        self.wrapped, self.optimizer = accelerator.prepare(self.task, optimizer)
        if state and self.is_sharded:
            sharding.spread(self.wrapped, optimizer, state["task"], state["optimizer"])
        if recipe.compile:
            # In place: the names of the weights stay as they are.
            self.wrapped.compile()
        self.saved_at = time.monotonic()
        if state and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        if accelerator.is_main_process:
            self.run.cut_log(state["log_bytes"] if state else 0)
        if state:
            self.log.restore(state["log"])

    def _train_epoch(self, stream: Iterator[dict]) -> bool:
        """Take the steps that are left of the current epoch; return False where the run is asked to leave."""
        recipe, epoch = self.recipe, self.scored_epochs
        end = (epoch + 1) * self.batches.steps_per_epoch
        done = (self.step - epoch * self.batches.steps_per_epoch) * recipe.batch_size
        images = self.batches.steps_per_epoch * recipe.batch_size
        title = f"epoch {epoch + 1}/{recipe.epochs}"
        finetuning.train_mode(self.wrapped)
        self.log.start_clock()
        with progress(images, title, initial=done, show=self.accelerator.is_main_process) as bar:
            while self.step < end:
                self._step(stream)
                bar.update(recipe.batch_size)
                if self.step % recipe.log_every == 0:
                    bar.set_postfix(self.log.write(self.step, epoch), refresh=False)
                is_due = time.monotonic() - self.saved_at >= recipe.checkpoint_every_s
                must_leave, must_save = self._agree(self.preemption.asked, is_due)
                if must_leave or must_save:
                    self._save()
                if must_leave:
                    return False
        return True

    def _agree(self, *wishes: bool) -> list[bool]:
        """Return, equally on all processes, which of the wishes one of them has."""
        if self.accelerator.num_processes == 1:
            return list(wishes)
        # Asking the others makes all wait for the slowest, so it is not done at every step.
        if self.step % _STEPS_BETWEEN_QUESTIONS and self.step % self.batches.steps_per_epoch:
            return [False] * len(wishes)
        asked = torch.tensor(wishes, dtype=torch.float32, device=self.accelerator.device)
        return (self.accelerator.reduce(asked, "sum") > 0).tolist()

    def _step(self, stream: Iterator[dict]) -> None:
        """Take one optimiser step, or leave it out where its loss or gradient is not finite."""
        recipe, accelerator = self.recipe, self.accelerator
        factor = optimisation.scheduled_factor(self.step, self.batches.end, recipe)
        optimisation.set_learning_rates(self.optimizer, factor)
        self.log.learning_rate = recipe.learning_rate * factor
        former = [buffer.clone() for buffer in self.statistics]
        outputs = []
        for part in range(recipe.accumulation):
            batch = self._next_batch(stream)
            # What dropout draws is a function of the step, so that a continued run draws the same.
            place = (self.step * recipe.accumulation + part) * self.batches.world + self.batches.rank
            torch.manual_seed(int(np.random.SeedSequence((recipe.seed, place)).generate_state(1)[0]))
            last = part == recipe.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                output = self.wrapped(batch)
                accelerator.backward(_or_nan(output["loss"]) / recipe.accumulation)
            outputs.append({key: value.detach() for key, value in output.items() if value.ndim == 0})
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), recipe.clip_norm or math.inf)
        # The one time that a step waits for the device. The norm of the averaged gradient is the same
        # everywhere, so all processes decide alike.
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(norm):
            self.optimizer.step()
            self.task.after_step(self.step, self.batches.end)
            self.log.take(outputs, norm)
            self.skipped_in_a_row = 0
        else:
            self._skip(former)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.log.images += recipe.batch_size

    def _skip(self, statistics: list[Tensor]) -> None:
        """Leave no trace of a step.

        Raises:
            UserError: too many steps in a row came to nothing.
        """
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.update()
        for buffer, former in zip(self.statistics, statistics, strict=True):
            buffer.copy_(former)
        self.task.after_skip()
        self.log.skip()
        self.skipped_in_a_row += 1
        most = max(self.recipe.max_skipped_steps, 0 if scaler is None else _MOST_OVERFLOWS)
        if self.skipped_in_a_row > most:
            raise UserError(
                f"{self.run.path}: loss or gradient was not finite at {self.skipped_in_a_row} steps in a "
                f"row, up to step {self.step + 1}; lower --learning-rate, or give --precision fp32"
            )

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
        expert = self._whole_expert()
        found = score_holdout(expert, self.holdout, self.recipe, self.accelerator)
        value = found["clean_auc"] if found["robust_auc"] is None else found["robust_auc"]
        is_best = self.scored_epochs == 0 or (value is not None and value > self.best)
        if is_best and value is not None:
            self.best = value
        self.scored_epochs += 1
        unreadable = gather_object(self.broken)
        self.log.epoch(self.step, self.scored_epochs, self.recipe.epochs, found, is_best)
        if self.accelerator.is_main_process:
            card = self.card | {"epoch": self.scored_epochs, "metrics": {"holdout": found}}
            for folder in (self.run.expert_last, self.run.expert) if is_best else (self.run.expert_last,):
                save_expert(expert, folder, card)
            if unreadable:
                self.run.add_unreadable(unreadable)
        self._save()

    def _whole_expert(self) -> Expert:
        """Return the expert that is scored and saved, as a plain one."""
        if not self.is_sharded:
            return finetuning.merged(self.task.evaluated)
        weights = sharding.gather_weights(self.wrapped)
        if self.accelerator.is_main_process:
            save_expert(sharding.whole_expert(self.task, weights), self.run.expert_last, self.card)
        self.accelerator.wait_for_everyone()
        return load_expert(self.run.expert_last).to(self.accelerator.device)

    def _save(self) -> None:
        """Write a checkpoint. A finished run only needs to say so: its weights are in the expert's folder."""
        finished = self.scored_epochs == self.recipe.epochs
        task = optimizer = None
        if self.is_sharded and not finished:
            task = sharding.gather_weights(self.wrapped)
            optimizer = sharding.gather_optimizer(self.wrapped, self.optimizer.optimizer)
        elif self.accelerator.is_main_process and not finished:
            task, optimizer = self.task.checkpoint(), self.optimizer.optimizer.state_dict()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            self.run.save_state(
                {
                    "task": task,
                    "optimizer": optimizer,
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "step": self.step,
                    "scored_epochs": self.scored_epochs,
                    "best": self.best,
                    "skipped_in_a_row": self.skipped_in_a_row,
                    "log": self.log.state(),
                },
                keep_previous=not finished,
            )
        self.saved_at = time.monotonic()


def _or_nan(loss: Tensor) -> Tensor:
    """Return the loss; where it is not finite, one whose gradient is not finite either.

    The cross-entropy of an infinite logit has a finite gradient. So what is skipped shows in the gradient's
    norm alone, on all processes.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
