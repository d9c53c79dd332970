"""Which part of a backbone is trained: all of it, nothing, its last layers, or low-rank adapters (LoRA).

Frozen parts are in evaluation mode as well: no dropout, and BatchNorm keeps its pretrained statistics.
"""

import copy
import importlib.util

from torch import nn

from featdistill.command_line import UserError
from featdistill.models.expert import Expert, called_linear_layers
from featdistill.recipe_groups import Finetuning


def restrict(expert: Expert, options: Finetuning) -> None:
    """Freeze what `options.finetune` does not train, or add the low-rank adapters.

    Raises:
        UserError: peft is not installed, or this backbone does not support adapters.
    """
    if options.finetune == "frozen":
        expert.backbone.requires_grad_(False)
    elif options.finetune == "last_n":
        # The last entry is what follows the last layer: norm, pooling, projection.
        trained = {name for names in expert.backbone.layers()[-(options.last_n + 1) :] for name in names}
        for name, parameter in expert.backbone.named_parameters():
            parameter.requires_grad_(name in trained)
    elif options.finetune == "lora":
        _add_adapters(expert, options)


def train_mode(module: nn.Module) -> None:
    """Put a module into training mode, and its frozen parts into evaluation mode."""
    module.train()
    for part in list(module.modules()):
        parameters = list(part.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            part.eval()


def merged(expert: Expert) -> Expert:
    """Return the expert with its adapters, if any, merged into the weights."""
    if not any(_is_adapter(module) for module in expert.modules()):
        return expert
    plain = copy.deepcopy(expert)
    for name, module in list(plain.named_modules()):
        if _is_adapter(module):
            module.merge(safe_merge=True)
            plain.set_submodule(name, module.get_base_layer())
    return plain


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "get_base_layer") and hasattr(module, "merge")


def _add_adapters(expert: Expert, options: Finetuning) -> None:
    """Add trainable matrices of low rank to the linear layers of attention and MLP (arXiv 2106.09685)."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("finetune lora needs the package peft; run pip install peft, or use finetune last_n")
    import peft

    targets = called_linear_layers(expert)
    if not targets:
        raise UserError(f"finetune lora: {expert.spec.name} has no linear layers; use finetune last_n")
    config = peft.LoraConfig(
        r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=targets, lora_dropout=0.0
    )
    peft.inject_adapter_in_model(config, expert.backbone)
