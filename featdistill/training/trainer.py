"""One training loop for both stages, on accelerate.

What differs between the stages is in a task: a module whose forward takes a batch and returns a dict with
`loss`. A killed run continues from its last checkpoint and ends with the same weights. On SIGTERM the loop
saves after the current step and returns.

With several processes, each takes its slice of every batch (`sampling.TrainBatches`), gradients are averaged
(DDP), each scores some batches of the hold-out, and only the main process writes. A process that cannot go on
makes its gradient NaN, and so all of them ask each other why before they skip the step.
"""

import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from featdistill.command_line import UserError, progress
from featdistill.data.loading import make_loader
from featdistill.data.mixed_sizes import batch_pieces
from featdistill.data.sampling import TrainBatches
from featdistill.data.train_dataset import TrainDataset
from featdistill.inference import compute
from featdistill.models.expert import Expert, copy_expert, load_expert, save_expert
from featdistill.training import averages, compilation, finetuning, optimizer, passes, sharding, teachers
from featdistill.training.from_tokens import TokenDataset, TokenHoldout
from featdistill.training.holdout import score_holdout
from featdistill.training.log import TrainingLog, start_trackers
from featdistill.training.processes import gradient_options, raise_first
from featdistill.training.recipe import Recipe
from featdistill.training.run_folder import RunFolder
from featdistill.training.selection import BestEpoch

_log = logging.getLogger(__name__)
# fp16 starts with its loss scaled by 2^16 and halves the scale at each overflow, which is normal; after this
# many in a row the scale is not the problem.
_MAX_OVERFLOWS = 20
# How often several processes ask each other whether to save or to leave.
_STEPS_BETWEEN_QUESTIONS = 10
# Batches from which BatchNorm's statistics are computed, at most: more of them change little.
_STATISTICS_STEPS = 200


class Trainer:
    """Trains a task to the end of its recipe, from the run folder's last checkpoint if there is one.

    Args:
        task: see `tasks`.
        holdout: labeled rows, scored after each epoch, perhaps from their tokens.
        card: entries of the expert's card in addition to its metrics.
        weights: (rows,) how often a row of the data set appears in an epoch, or None: once.
    """

    def __init__(
        self,
        task: nn.Module,
        dataset: TrainDataset | TokenDataset,
        holdout: pd.DataFrame | TokenHoldout,
        recipe: Recipe,
        run: RunFolder,
        accelerator: Accelerator,
        card: dict[str, Any],
        weights: np.ndarray | None = None,
    ) -> None:
        self.task, self.dataset, self.holdout = task, dataset, holdout
        self.recipe, self.run, self.accelerator, self.card = recipe, run, accelerator, card
        self.is_sharded = sharding.is_sharded(accelerator)
        if self.is_sharded:
            sharding.check(recipe)
        self.step, self.scored_epochs, self.skipped_in_a_row = 0, 0, 0
        self.best = BestEpoch(recipe)
        self.broken: list[tuple[str, str]] = []
        # Why this process cannot go on, until the others know.
        self.failure: str | None = None
        self.log = TrainingLog(run, accelerator)
        self.must_stop, self.process = False, os.getpid()
        self.batches = TrainBatches(
            len(dataset),
            recipe.batch_size,
            recipe.epochs,
            recipe.seed,
            stage=dataset.stage,
            accumulation=recipe.accumulation,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            weights=weights,
        )

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are scored, or enough of them without a better one."""
        return self.scored_epochs == self.recipe.epochs or self.best.waited_enough(self.scored_epochs)

    @property
    def _is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.monotonic() - self.saved_at >= self.recipe.checkpoint_every_s

    def fit(self) -> int:
        """Train until the run is finished or SIGTERM arrives; do nothing if it is finished already.

        Returns:
            1 if the run is finished, but images could not be read; else 0.
        """
        state = self.run.load_state()
        if state:
            self.step, self.scored_epochs = state["step"], state["scored_epochs"]
            self.best.epoch, self.best.quality = state["best_epoch"], state["best"]
            self.skipped_in_a_row = state["skipped_in_a_row"]
        if self.is_finished:
            _log.info(f"{self.run.path} is finished; nothing to do")
            return self.run.report()
        previous = signal.signal(signal.SIGTERM, self._request_stop)
        try:
            start_trackers(self.accelerator, self.recipe, self.run)
            self._prepare(state)
            self.batches.start = self.step
            stream = iter(make_loader(self.dataset, self.batches, self.recipe.workers))
            while not self.is_finished:
                # A run killed between the last step of an epoch and its scores still owes the scores.
                if not self._train_epoch(stream):
                    _log.info(
                        f"stopped at step {self.step} of {self.batches.end}; the same command continues"
                    )
                    break
                self.log.write(self.step, self.scored_epochs)
                self._score_epoch()
            self.accelerator.wait_for_everyone()
        finally:
            signal.signal(signal.SIGTERM, previous)
        return self.run.report() if self.is_finished else 0

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM: stop after the current step; a second signal, during the save, changes nothing.

        Loader workers are forked with this handler and so survive the signal, which may go to the whole
        process group: the current step still needs them.
        """
        self.must_stop = os.getpid() == self.process

    def _prepare(self, state: dict[str, Any] | None) -> None:
        """Put model and optimizer on the device, in the state of the last checkpoint."""
        recipe, accelerator = self.recipe, self.accelerator
        finetuning.restrict(self.task.expert, recipe)
        if self.is_sharded:
            # FSDP does not support weights in the channels-last format.
            self.task.to(memory_format=torch.contiguous_format)
        teachers.cast_frozen(self.task, "fp32" if self.is_sharded else recipe.precision)
        if recipe.gradient_checkpointing:
            selective = recipe.checkpointing == "selective"
            self.task.expert.backbone.set_gradient_checkpointing(True, selective)
        self.statistics = [
            buffer
            for part in self.task.expert.modules()
            if isinstance(part, nn.modules.batchnorm._BatchNorm)
            for buffer in part.buffers()
        ]
        accelerator.ddp_handler = gradient_options(self.task.expert, bool(self.statistics))
        plain_optimizer = optimizer.make_optimizer(self.task, recipe, accelerator.device)
        if state:
            if not self.is_sharded:
                self.task.load_checkpoint(state["task"])
                plain_optimizer.load_state_dict(state["optimizer"])
            _log.info(f"continuing {self.run.path} at step {self.step} of {self.batches.end}")
        self.wrapped, self.optimizer = accelerator.prepare(self.task, plain_optimizer)
        if state and self.is_sharded:
            sharding.spread(self.wrapped, plain_optimizer, state["task"], state["optimizer"])
        if compilation.is_wanted(recipe, self.task.expert, accelerator, self.batches.end):
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
        """Take the remaining steps of the current epoch; return False if the run has to leave early."""
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
                must_leave, must_save = self._agree(self.must_stop, self._is_due)
                if must_leave or must_save:
                    self._save()
                if must_leave:
                    return False
        return True

    def _agree(self, *wishes: bool) -> list[bool]:
        """Return, for each wish, whether any process has it; the answer is the same on all processes."""
        if self.accelerator.num_processes == 1:
            return list(wishes)
        # Asking makes all processes wait for the slowest, so it is not done at every step.
        if self.step % _STEPS_BETWEEN_QUESTIONS and self.step % self.batches.steps_per_epoch:
            return [False] * len(wishes)
        votes = torch.tensor(wishes, dtype=torch.float32, device=self.accelerator.device)
        return (self.accelerator.reduce(votes, "sum") > 0).tolist()

    def _step(self, stream: Iterator[dict]) -> None:
        """Take one optimizer step, or skip it if its loss or gradient is not finite."""
        recipe, accelerator = self.recipe, self.accelerator
        factor = optimizer.learning_rate_factor(self.step, self.batches.end, recipe)
        optimizer.set_learning_rates(self.optimizer, factor)
        self.log.learning_rate = recipe.learning_rate * factor
        statistics = [buffer.clone() for buffer in self.statistics]
        outputs, batches = [], []
        for part in range(recipe.accumulation):
            batches.append(self._next_batch(stream))
            outputs.append(self._add_gradient(batches[-1], part))
        if recipe.sam_rho:
            self._take_gradient_uphill(batches)
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), recipe.clip_norm or math.inf)
        # The only time that a step waits for the device. The norm of the averaged gradient is the same on all
        # processes, so all decide alike.
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(norm):
            self.optimizer.step()
            self.task.after_step(self.step, self.batches.end)
            self.log.add(outputs, norm)
            self.skipped_in_a_row = 0
        else:
            self._skip(statistics)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.log.images += recipe.batch_size

    def _take_gradient_uphill(self, batches: list[dict[str, Any]]) -> None:
        """Replace the gradient of a step's batches by that of SAM; all else stays as their passes left it."""
        statistics = [buffer.clone() for buffer in self.statistics]
        self.task.after_skip()
        with optimizer.uphill(self.task.parameters(), self.recipe.sam_rho):
            self.optimizer.zero_grad(set_to_none=True)
            for part, batch in enumerate(batches):
                self._add_gradient(batch, part)
        passes.restore(self.statistics, statistics)

    def _add_gradient(self, batch: dict[str, Any], part: int) -> dict[str, Tensor]:
        """Add the gradient of a batch, whose images may differ in size, and return the means of the outputs.

        Args:
            part: its number among the batches of the step.
        """
        number = (self.step * self.recipe.accumulation + part) * self.batches.world + self.batches.rank
        passes.seed_dropout(self.recipe.seed, self.dataset.stage, number)
        is_last = part == self.recipe.accumulation - 1
        fitted, means, seen = self.dataset.preprocessing, {}, 0
        for piece in batch_pieces(batch, fitted.size) if fitted.sizes else [batch]:
            share = len(piece["label"]) / len(batch["label"])
            seen += len(piece["label"])
            synchronizes = is_last and seen == len(batch["label"])
            gradients = nullcontext() if synchronizes else self.accelerator.no_sync(self.wrapped)
            kernels = compute.attention_kernels(self.accelerator.device)
            errors = (compute.failed_compilation_is_an_error(), compute.full_memory_is_an_error())
            with gradients, kernels, errors[0], errors[1]:
                output = self.wrapped(piece)
                loss = output["loss"] * math.nan if self.failure else output["loss"]
                self.accelerator.backward(passes.or_nan(loss) * share / self.recipe.accumulation)
            for key, value in output.items():
                if value.ndim == 0:
                    means[key] = means.get(key, 0) + share * value.detach()
        return means

    def _skip(self, statistics: list[Tensor]) -> None:
        """Undo what a step has changed, given the statistics of BatchNorm before it.

        Raises:
            UserError: a process cannot go on, or too many steps in a row were skipped.
        """
        raise_first(self.failure)
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.update()
        passes.restore(self.statistics, statistics)
        self.task.after_skip()
        self.log.add_skipped()
        self.skipped_in_a_row += 1
        maximum = max(self.recipe.max_skipped_steps, 0 if scaler is None else _MAX_OVERFLOWS)
        if self.skipped_in_a_row > maximum:
            raise UserError(
                f"{self.run.path}: loss or gradient was not finite at {self.skipped_in_a_row} steps in a "
                f"row, up to step {self.step + 1}; lower --learning-rate, or use --precision fp32"
            )

    def _next_batch(self, stream: Iterator[dict]) -> dict[str, Tensor]:
        """Return the next batch on the device; a blank one if there is none and other processes wait.

        Raises:
            UserError: this is the only process, and there is no next batch.
        """
        started, batch = time.monotonic(), {}
        try:
            batch = {} if self.failure else next(stream)
            self.log.waited_s += time.monotonic() - started
            self.broken += [(self.dataset.images[row.index], row.reason) for row in batch.pop("broken", [])]
            if "images" not in batch and not self.failure:
                raise UserError(
                    f"none of the images of a batch can be read; the last is {': '.join(self.broken[-1])}"
                )
        except UserError as error:
            if self.accelerator.num_processes == 1:
                raise
            self.failure = str(error)
        batch = passes.blank_batch(self.dataset) if self.failure else batch
        return {key: value.to(self.accelerator.device, non_blocking=True) for key, value in batch.items()}

    def _score_epoch(self) -> None:
        """Score the hold-out, save the expert (also as the best one, if it is), and, if due, a checkpoint."""
        self.task.after_epoch(self.scored_epochs + 1)
        self._renew_statistics()
        expert = self._whole_expert()
        holdout, unreadable = score_holdout(expert, self.holdout, self.recipe, self.accelerator)
        if self.accelerator.is_main_process:
            self.broken += unreadable
        self.scored_epochs += 1
        is_best = self.best.add(self.scored_epochs, holdout)
        self.log.epoch(self.step, self.scored_epochs, self.recipe.epochs, holdout, is_best)
        if self.best.waited_enough(self.scored_epochs):
            _log.info(f"no epoch after {self.best.epoch} was better, so the run ends here (patience)")
        if self.accelerator.is_main_process:
            reached = {"epoch": self.scored_epochs, "finished": self.is_finished}
            card = self.card | reached | {"metrics": {"holdout": holdout}}
            save_expert(expert, self.run.expert_last, card)
            if is_best:
                copy_expert(self.run.expert_last, self.run.expert)
        if self.is_finished or any(self._agree(self._is_due)):
            self._save()

    def _renew_statistics(self) -> None:
        """Compute the statistics of an average's BatchNorm layers from images of the epoch that has ended."""
        norms, workers = self.task.stale_norms(), self.recipe.workers
        if norms:
            images = passes.images_of_epoch(
                self.dataset, self.batches, self.scored_epochs, _STATISTICS_STEPS, workers
            )
            with self.accelerator.autocast():
                averages.renew_statistics(self.task.evaluated, norms, images, self.accelerator.reduce)

    def _whole_expert(self) -> Expert:
        """Return the expert that is scored and saved, without adapters and sharding."""
        if not self.is_sharded:
            return finetuning.merged(self.task.evaluated)
        weights = sharding.gather_weights(self.wrapped)
        if self.accelerator.is_main_process:
            save_expert(sharding.whole_expert(self.task, weights), self.run.expert_last, self.card)
        self.accelerator.wait_for_everyone()
        return load_expert(self.run.expert_last).to(self.accelerator.device)

    def _save(self) -> None:
        """Write a checkpoint, for a finished run without weights: they are in the expert's folder."""
        is_finished = self.is_finished
        unreadable, self.broken = gather_object(self.broken), []
        task = optimizer_state = None
        if self.is_sharded and not is_finished:
            task, optimizer_state = sharding.gather(self.wrapped, self.optimizer.optimizer)
        elif self.accelerator.is_main_process and not is_finished:
            task, optimizer_state = self.task.checkpoint(), self.optimizer.optimizer.state_dict()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            self.run.add_unreadable(unreadable)
            self.run.save_state(
                {
                    "task": task,
                    "optimizer": optimizer_state,
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "step": self.step,
                    "scored_epochs": self.scored_epochs,
                    "best": self.best.quality,
                    "best_epoch": self.best.epoch,
                    "skipped_in_a_row": self.skipped_in_a_row,
                    "log": self.log.state(),
                },
                keep_previous=not is_finished,
            )
        self.saved_at = time.monotonic()
