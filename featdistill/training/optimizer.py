"""The optimiser that the recipe asks for: its schedule, what decays, and how fast each layer learns."""

import math
from typing import Any

import torch
from torch import nn

from featdistill.models.expert import Expert
from featdistill.training.recipe import Recipe

# What is added to activations, as timm and open_clip call it: decay would pull it to 0.
_NO_DECAY = ("pos_embed", "cls_token", "dist_token", "reg_token", "mask_token", "latent", "probe")
_NO_DECAY += ("positional_embedding", "class_embedding", "relative_position_bias_table", "query")


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


def scheduled_factor(step: int, total: int, recipe: Recipe) -> float:
    """Return the learning rate at a step relative to its peak, as the recipe's schedule has it.

    `step` multiplies it by `step_factor` every `step_epochs` epochs, after the same warm-up as the cosine's.

    Args:
        step, total: see `learning_rate_factor`; `total` is of all epochs.
    """
    if recipe.schedule == "cosine":
        return learning_rate_factor(step, total, recipe.warmup, recipe.final_learning_rate_factor)
    falls = step * recipe.epochs // total // recipe.step_epochs
    return learning_rate_factor(step, total, recipe.warmup, 1.0) * recipe.step_factor**falls


def parameter_groups(task: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the optimiser's groups, each with its `peak_learning_rate` and `weight_decay`.

    The head and the task's own parameters (projections) learn at `head_learning_rate_factor` times the
    recipe's rate; the backbone's last layer (norm, pooling, projection) at that rate, and each layer before
    it at `layer_decay` times that of the layer behind it (as BEiT's fine-tuning does, arXiv 2106.08254).
    Biases, norms and what is added to activations do not decay.

    Args:
        task: has `expert` and `extra_parameters()`; parameters that take no gradient are left out.
    """
    expert = task.expert
    factors = _layer_factors(expert, recipe.layer_decay)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}

    def add(parameter: nn.Parameter, factor: float, decays: bool) -> None:
        group = groups.setdefault(
            (factor, decays),
            {
                "params": [],
                "peak_learning_rate": recipe.learning_rate * factor,
                "weight_decay": recipe.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)

    for name, parameter in expert.named_parameters():
        if parameter.requires_grad:
            is_head = name.startswith("head.")
            factor = recipe.head_learning_rate_factor if is_head else factors.get(name, 1.0)
            add(parameter, factor, parameter.ndim >= 2 and not name.endswith(_NO_DECAY))
    for parameter in task.extra_parameters():
        add(parameter, recipe.head_learning_rate_factor, parameter.ndim >= 2)
    return list(groups.values())


def make_optimizer(task: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimiser of what the task trains; on a GPU its fused kernel, which reads weights once."""
    optimizer = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.optimizer]
    return optimizer(parameter_groups(task, recipe), fused=device.type == "cuda")


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_learning_rate"] * factor


def _layer_factors(expert: Expert, layer_decay: float) -> dict[str, float]:
    """Return the factor of each of the backbone's parameters, by its name in the expert."""
    if layer_decay == 1:
        return {}
    layers = expert.backbone.layers()
    return {
        f"backbone.{name}": layer_decay**depth
        for depth, names in enumerate(reversed(layers))
        for name in names
    }
