"""The optimizer of a recipe: its schedule, what decays, and how fast each layer learns."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from featdistill.recipe_groups import Optimization

# Parameters that are added to activations, by their names in timm and open_clip: decay would pull them to 0.
_NO_DECAY = ("pos_embed", "cls_token", "dist_token", "reg_token", "mask_token", "latent", "probe")
_NO_DECAY += ("positional_embedding", "class_embedding", "relative_position_bias_table", "query")


def learning_rate_factor(step: int, total: int, options: Optimization) -> float:
    """Return the learning rate at a step relative to its peak.

    After a linear warm-up, schedule `cosine` falls to `final_learning_rate_factor`, and `step` is multiplied
    by `step_factor` every `step_epochs` epochs.

    Args:
        step: optimizer steps already taken, 0 .. total - 1.
        total: steps of all epochs.
    """
    warm_steps = math.ceil(options.warmup * total)
    reductions = 0
    if options.schedule == "step":
        reductions = step * options.epochs // total // options.step_epochs
    if step < warm_steps:
        factor = (step + 1) / warm_steps
    elif options.schedule == "cosine":
        done = (step - warm_steps) / max(1, total - warm_steps)
        final = options.final_learning_rate_factor
        factor = final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
    else:
        factor = 1.0
    return factor * options.step_factor**reductions


def parameter_groups(task: nn.Module, options: Optimization) -> list[dict[str, Any]]:
    """Return the optimizer's groups, each with its `peak_learning_rate` and `weight_decay`.

    The head and the task's own parameters (projections) learn at `head_learning_rate_factor` times
    `learning_rate`; the backbone's last layer (norm, pooling, projection) at that rate, and each layer before
    it at `layer_decay` times that of the next one (as in BEiT's fine-tuning, arXiv 2106.08254). Biases, norms
    and parameters that are added to activations do not decay.

    Args:
        task: has `expert` and `extra_parameters()`; parameters without gradient are left out.
    """
    head_factor, factors = options.head_learning_rate_factor, {}
    if options.layer_decay != 1:
        for depth, names in enumerate(reversed(task.expert.backbone.layers())):
            factors |= dict.fromkeys((f"backbone.{name}" for name in names), options.layer_decay**depth)
    trained = [
        (
            parameter,
            head_factor if name.startswith("head.") else factors.get(name, 1.0),
            parameter.ndim >= 2 and not name.endswith(_NO_DECAY),
        )
        for name, parameter in task.expert.named_parameters()
        if parameter.requires_grad
    ]
    trained += [(parameter, head_factor, parameter.ndim >= 2) for parameter in task.extra_parameters()]
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for parameter, factor, decays in trained:
        group = {
            "params": [],
            "peak_learning_rate": options.learning_rate * factor,
            "weight_decay": options.weight_decay if decays else 0.0,
        }
        groups.setdefault((factor, decays), group)["params"].append(parameter)
    return list(groups.values())


def make_optimizer(task: nn.Module, options: Optimization, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of the task; on a GPU with its fused kernel, which reads weights once."""
    optimizer = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[options.optimizer]
    return optimizer(parameter_groups(task, options), fused=device.type == "cuda")


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_learning_rate"] * factor


@contextmanager
def uphill(parameters: Iterable[nn.Parameter], rho: float) -> Iterator[None]:
    """Move weights w to w + rho g / ||g||, g their gradient, and back to the same bits afterwards.

    The gradient there is that of sharpness-aware minimization (SAM, Foret et al. 2021, eq. 3). A gradient
    that is not finite makes the weights, and so the next gradient, not finite.
    """
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    kept = [parameter.detach().clone() for parameter in moved]
    gradients = [parameter.grad for parameter in moved]
    with torch.no_grad():
        scale = rho / torch.nn.utils.get_total_norm(gradients).clamp(min=1e-12)
        for parameter, gradient in zip(moved, gradients, strict=True):
            parameter.add_(gradient * scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weights in zip(moved, kept, strict=True):
                parameter.copy_(weights)
