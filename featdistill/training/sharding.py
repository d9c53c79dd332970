"""Tasks whose weights are distributed over the processes (FSDP), for backbones too large for one GPU.

Start with an accelerate configuration for FSDP (`accelerate launch --use_fsdp --fsdp_version 2 ...`).
Checkpoints hold whole tensors, gathered by the main process, so a run may continue on another number of GPUs.
Each process scores the hold-out with a whole expert, so training needs several times the expert's memory.
"""

from typing import Any

from accelerate import Accelerator, DistributedType
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from featdistill.command_line import UserError
from featdistill.models.backbones import build
from featdistill.models.expert import Expert
from featdistill.training.recipe import Recipe

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check(recipe: Recipe) -> None:
    """Refuse what needs whole weights.

    Raises:
        UserError: the recipe has low-rank adapters, an average of the weights, a momentum teacher, or inputs
            of several sizes, whose numbers of passes differ between processes.
    """
    if recipe.finetune == "lora":
        raise UserError("finetune lora does not work with FSDP; use finetune last_n, or start without FSDP")
    if recipe.sam_rho:
        raise UserError("sam_rho does not work with FSDP; use sam_rho 0, or start without FSDP")
    if recipe.input_sizes is not None:
        raise UserError("input_sizes does not work with FSDP; use input_size, or start without FSDP")
    if recipe.ema or recipe.swa_start or getattr(recipe, "teacher_kind", None) == "momentum":
        raise UserError(
            "averages of the weights and momentum teachers do not work with FSDP; use ema 0, swa_start 0 and "
            "teacher_kind frozen, or start without FSDP"
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether the accelerator distributes weights over its processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def gather_weights(task: nn.Module) -> dict[str, Tensor]:
    """Return all weights and buffers on the main process, nothing on the others. All must call it."""
    return get_model_state_dict(task, options=_WHOLE)


def gather(task: nn.Module, optimizer: optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all weights, and the optimizer's state keyed by weight names, as `gather_weights` does."""
    return get_state_dict(task, optimizer, options=_WHOLE)


def spread(
    task: nn.Module, optimizer: optim.Optimizer, weights: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Restore what `gather` returned, which every process has read."""
    set_state_dict(task, optimizer, model_state_dict=weights, optim_state_dict=state, options=_WHOLE)


def whole_expert(task: nn.Module, weights: dict[str, Tensor]) -> Expert:
    """Build the expert that is scored and saved from gathered weights, on the CPU."""
    sharded: Expert = task.evaluated
    prefix = next(name for name, module in task.named_modules() if module is sharded) + "."
    head, spec = sharded.head_config, sharded.spec
    expert = Expert(build(spec), spec, head["hidden"], head["dropout"])
    expert.preprocessing = sharded.preprocessing
    state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    expert.load_state_dict(state, strict=True)
    return expert.eval()
