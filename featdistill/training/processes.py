"""The processes of a run, their devices and their precision, through accelerate."""

import logging
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
)

from featdistill.command_line import UserError
from featdistill.models.expert import Expert
from featdistill.training.log import tracker_names
from featdistill.training.recipe import Recipe
from featdistill.training.run_folder import RunFolder

_MAX_WAIT = timedelta(hours=12)


def make_accelerator(recipe: Recipe, run: RunFolder) -> Accelerator:
    """Set up the process group and precision; nothing is written yet.

    Raises:
        UserError: this hardware does not support the precision, a tracker is not available, or the recipe
            needs a single process.
    """
    trackers = tracker_names(recipe.trackers)
    # A cache can take hours to make, while the other processes wait for the main one.
    patience = {"timeout": _MAX_WAIT} if recipe.cache else {}
    # Without a GPU, accelerate treats the processes of torchrun as unrelated, unless told.
    on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    if recipe.precision == "fp16" and PartialState(cpu=on_cpu, **patience).device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; use --precision bf16 or fp32")
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if recipe.precision == "fp32" else recipe.precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(logging_dir=str(run.path / "tensorboard")),
        kwargs_handlers=[InitProcessGroupKwargs(**patience)],
    )
    if accelerator.num_processes > 1 and recipe.input_sizes is not None and recipe.supcon_weight:
        raise UserError(
            "supcon_weight compares images over all processes, but with input_sizes they take different "
            "numbers of passes; use one process, or input_size"
        )
    if not accelerator.is_main_process:
        # One process reports for all.
        logging.getLogger("featdistill").setLevel(logging.WARNING)
    return accelerator


def end_group(accelerator: Accelerator, trainer: Any) -> None:
    """End the trackers and the group of processes after a run.

    DDP, which a trainer holds as `wrapped`, goes first: if its reducer is the last to hold a gloo group, it
    waits for the group's threads without releasing Python's lock, which they may need (seen in PyTorch 2.8).
    """
    if accelerator.num_processes > 1:
        trainer.wrapped = None
        accelerator.free_memory()
    accelerator.end_training()


def raise_first(failure: str | None) -> None:
    """Raise a `UserError` in all processes if any of them has a failure."""
    if failures := [each for each in gather_object([failure]) if each]:
        raise UserError(failures[0])


def gradient_options(expert: Expert, has_statistics: bool) -> DistributedDataParallelKwargs:
    """Return how processes average the gradients of a task with this expert.

    Args:
        has_statistics: whether there are BatchNorm layers, whose statistics drift apart between processes;
            other buffers, such as a queue, do not, and are large.
    """
    return DistributedDataParallelKwargs(
        broadcast_buffers=has_statistics,
        gradient_as_bucket_view=True,
        # A feature may leave out a backbone's pooling, or its last blocks.
        find_unused_parameters=expert.spec.feature != expert.backbone.kind,
    )
