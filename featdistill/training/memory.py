"""An estimate of the GPU memory that training needs, from the architecture and the recipe alone.

The sum of two parts, in bytes:

- weights: 6 per parameter (4, and 2 for its copy in bf16) and 12 more for each that is trained (gradient and
  AdamW); 4 more per parameter for an average of the weights, and for the teacher of stage 2 6, or 2 if it is
  frozen and in bf16; 4 more per trained one for SAM
- activations, for each image of a pass: 2.5 per value that a module returns and that depends on what is
  trained

The 2.5 is fitted: most values are kept in 2 bytes and the residual stream in 4, and attention and residual
sums keep values that no module returns. In fp32 there is no copy, and a value has 4 bytes. With gradient
checkpointing a tenth of the activations is kept, with the selective one about half (23 of 43 bytes per value
of a block, by counting). docs/training.md compares it with measured peaks.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featdistill.models.expert import create_expert
from featdistill.recipe_groups import Architecture, Finetuning, values_of
from featdistill.training import finetuning
from featdistill.training.recipe import DistillRecipe, Recipe

_BYTES_PER_VALUE = 2.5
_KEPT_BY_CHECKPOINTING = {"blocks": 0.1, "selective": 0.55}


class Estimate(NamedTuple):
    """Properties of a recipe: parameters of the expert, sides of the input, GiB for training on one GPU."""

    parameters: int
    input: str
    training_gib: float


class _Measured(NamedTuple):
    total: int
    trained: int
    values: int
    sizes: tuple[int, ...]


def estimate(recipe: Recipe) -> Estimate:
    """Estimate what a recipe needs, on the meta device: nothing is downloaded, allocated or computed."""
    architecture = Architecture(**(values_of(Architecture, recipe) | {"weights": "random"}))
    total, trained, values, sizes = _measure(architecture, Finetuning(**values_of(Finetuning, recipe)))
    is_fp32, is_second = recipe.precision == "fp32", isinstance(recipe, DistillRecipe)
    weight = 4 if is_fp32 else 6
    is_cast = is_second and recipe.precision == "bf16" and recipe.teacher_kind == "frozen"
    teacher = 2 if is_cast else weight * is_second
    fixed = total * (weight + 4 * bool(recipe.ema or recipe.swa_start) + teacher)
    fixed += trained * (12 + 4 * bool(recipe.sam_rho))
    activations = values * (4 if is_fp32 else _BYTES_PER_VALUE)
    if recipe.gradient_checkpointing:
        activations *= _KEPT_BY_CHECKPOINTING[recipe.checkpointing]
    # Pieces of a batch with several sizes have at most as many pixels as the whole batch at the smallest.
    images = max(1, recipe.batch_size / recipe.accumulation * (sizes[0] / sizes[-1]) ** 2)
    return Estimate(total, ",".join(map(str, sizes)), (fixed + images * activations) / 2**30)


@functools.cache
def _measure(architecture: Architecture, options: Finetuning) -> _Measured:
    """Count parameters, and `_values` of an image of the largest side."""
    with torch.device("meta"):
        expert = create_expert(**dataclasses.asdict(architecture))
        total = sum(parameter.numel() for parameter in expert.parameters())
        finetuning.restrict(expert, options)
        sizes = expert.preprocessing.sizes or (expert.preprocessing.size,)
        values = _values(expert, torch.empty(1, 3, sizes[-1], sizes[-1]))
    trained = sum(parameter.numel() for parameter in expert.parameters() if parameter.requires_grad)
    return _Measured(total, trained, values, tuple(sizes))


def _values(expert: nn.Module, images: Tensor) -> int:
    """Count the values that modules return for images and that depend on trained parameters."""
    count = 0

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal count
        is_new = isinstance(output, Tensor) and output.requires_grad and output is not inputs[0]
        count += output.numel() if is_new else 0

    parts = [module for module in expert.modules() if not list(module.children())]
    hooks = [part.register_forward_hook(add) for part in parts]
    expert.eval()(images)
    for hook in hooks:
        hook.remove()
    return count
