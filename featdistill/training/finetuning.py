"""What of a backbone is trained: all of it, nothing, its last layers, or low-rank additions (LoRA).

What is not trained is in evaluation mode as well: its dropout does nothing, and its BatchNorm keeps the
statistics that it came with.
"""

import copy
import importlib.util

import torch
from torch import nn

from featdistill.command_line import UserError
from featdistill.models.expert import Expert
from featdistill.training.recipe import Recipe


def restrict(expert: Expert, recipe: Recipe) -> None:
    """Keep the gradient from what `recipe.finetune` does not train, or add the low-rank matrices.

    Raises:
        UserError: peft is not installed, or has nothing in this backbone to add to.
    """
    if recipe.finetune == "frozen":
        expert.backbone.requires_grad_(False)
    elif recipe.finetune == "last_n":
        # The last entry is what comes after the last layer: norm, pooling, projection.
        trained = {name for names in expert.backbone.layers()[-(recipe.last_n + 1) :] for name in names}
        for name, parameter in expert.backbone.named_parameters():
            parameter.requires_grad_(name in trained)
    elif recipe.finetune == "lora":
        _add_low_rank(expert, recipe)


def train_mode(module: nn.Module) -> None:
    """Put a module into training mode, and what of it is frozen into evaluation mode."""
    module.train()
    frozen = [part for part in module.modules() if _is_frozen(part)]
    for part in frozen:
        part.eval()


def merged(expert: Expert) -> Expert:
    """Return the expert with its low-rank additions, if any, added to the weights they belong to."""
    if not any(_is_adapter(module) for module in expert.modules()):
        return expert
    plain = copy.deepcopy(expert)
    for name, module in list(plain.named_modules()):
        if _is_adapter(module):
            module.merge(safe_merge=True)
            plain.set_submodule(name, module.get_base_layer())
    return plain


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "get_base_layer") and hasattr(module, "merge")


def _add_low_rank(expert: Expert, recipe: Recipe) -> None:
    """Add trainable matrices of low rank to the linear layers of attention and MLP (arXiv 2106.09685)."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "finetune lora needs the package peft; run pip install peft, or give --finetune last_n"
        )
    import peft

    targets = _linear_layers(expert)
    if not targets:
        raise UserError(f"finetune lora: {recipe.backbone} has no linear layers; give --finetune last_n")
    config = peft.LoraConfig(
        r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=targets, lora_dropout=0.0
    )
    peft.inject_adapter_in_model(config, expert.backbone)


def _linear_layers(expert: Expert) -> list[str]:
    """Return the names of the backbone's linear layers that a forward pass calls.

    Some attentions read the weights of a linear layer without calling it (the projections of BEiT's queries
    and of PyTorch's own attention, which open_clip has); they would pass over what is added there.
    """
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in expert.backbone.named_modules()
        if isinstance(module, nn.Linear)
    ]
    size, was_training = expert.preprocessing.size, expert.training
    expert.eval()
    with torch.no_grad():
        expert(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=expert.mean.device))
    expert.train(was_training)
    for hook in hooks:
        hook.remove()
    return sorted(called)
