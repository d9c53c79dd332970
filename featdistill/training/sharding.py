"""Tasks whose weights are spread over the processes (FSDP), for backbones that one GPU does not hold.

Launch with an accelerate configuration that says so (`accelerate launch --use_fsdp --fsdp_version 2 ...`).
Checkpoints hold whole tensors, gathered by the main process, so a run may continue on another number of GPUs.
The hold-out is scored by each process with a whole expert: training needs several times its memory.
"""

from typing import Any

from accelerate import Accelerator, DistributedType
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from featdistill.models.backbones import build
from featdistill.models.expert import Expert

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether the accelerator spreads weights over its processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def gather_weights(task: nn.Module) -> dict[str, Tensor]:
    """Return all weights and buffers on the main process, nothing on the others. All must call it."""
    return get_model_state_dict(task, options=_WHOLE)


def gather_optimizer(task: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
    """Return the optimiser's state on the main process, by the names of the weights. All must call it."""
    return get_optimizer_state_dict(task, optimizer, options=_WHOLE)


def spread(
    task: nn.Module, optimizer: optim.Optimizer, weights: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Take up what `gather_weights` and `gather_optimizer` returned, which every process has read."""
    set_model_state_dict(task, weights, options=_WHOLE)
    set_optimizer_state_dict(task, optimizer, state, options=_WHOLE)


def whole_expert(task: nn.Module, weights: dict[str, Tensor]) -> Expert:
    """Return the expert that is scored and saved, built anew from gathered weights, on the CPU."""
    spread_out: Expert = task.evaluated
    prefix = next(name for name, module in task.named_modules() if module is spread_out) + "."
    head, preprocessing = spread_out.head_config, spread_out.preprocessing
    expert = Expert(
        build(spread_out.spec), spread_out.spec, head["hidden"], head["dropout"], preprocessing.resize
    )
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    expert.load_state_dict(own, strict=True)
    return expert.eval()
