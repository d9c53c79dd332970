"""Whether a run is compiled: the recipe's `compile`, whose `auto` follows what was measured."""

import logging

import torch
from accelerate import Accelerator

from featdistill.command_line import UserError
from featdistill.inference import compute
from featdistill.models.expert import Expert
from featdistill.training.recipe import Recipe, StudentRecipe

# Architectures and sides in px. On an H200, a compiled step of stage 1 with 64 images of CLIP ViT-L/14 in
# bf16 takes .72 of the time of an eager one (docs/performance.md); no other network was measured in training.
_FASTER = {("vit_large_patch14_clip_quickgelu_224", 224)}
# Ours: compiling takes up to 2 minutes, and each of these images is 1/585 - 1/808 s faster.
_MIN_IMAGES = 250_000

_log = logging.getLogger(__name__)


def is_wanted(recipe: Recipe, expert: Expert, accelerator: Accelerator, steps: int) -> bool:
    """Return whether to compile a run, and set the compiler up if so.

    What `auto` decides depends on the machine, and not on how far the run has come.

    Args:
        expert: the student.
        steps: of the whole run, those that are done already among them.
    """
    device = accelerator.device
    if recipe.compile == "auto":
        reason = reason_against(recipe, expert, device.type, accelerator.num_processes, steps)
        if reason and device.type == "cpu":
            return False
        reason = reason or _failure(device)
        _log.info("compile auto: " + (f"not compiled ({reason})" if reason else "compiled"))
        return not reason
    if recipe.compile:
        compute.set_up_compiler(device)
    return recipe.compile


def reason_against(recipe: Recipe, expert: Expert, device: str, processes: int, steps: int) -> str | None:
    """Return why `auto` does not compile a run with these settings, or None.

    Args:
        device: its type.
        steps: see `is_wanted`.
    """
    size, images = expert.preprocessing.size, steps * recipe.batch_size
    unlike = {
        "precision fp32": recipe.precision == "fp32",
        "input_sizes": recipe.input_sizes is not None,
        f"finetune {recipe.finetune}": recipe.finetune != "full",  # always so with --tokens
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "a student of several experts": isinstance(recipe, StudentRecipe),
        f"{processes} processes": processes > 1,
        f"{expert.spec.name} at {size} px": (expert.spec.name, size) not in _FASTER,
    }
    if device != "cuda":
        return f"the device is {device}"
    if names := [name for name, is_so in unlike.items() if is_so]:
        return f"not measured to be faster: {', '.join(names)}"
    if images < _MIN_IMAGES:
        return f"the run has {images:,} images, and compiling pays from {_MIN_IMAGES:,}"
    return None


def _failure(device: torch.device) -> str | None:
    """Return why this machine cannot compile, or None."""
    compute.set_up_compiler(device)
    try:
        with compute.failed_compilation_is_an_error():
            torch.compile(torch.neg)(torch.zeros(1, device=device))
    except UserError as error:
        return str(error)
    return None
