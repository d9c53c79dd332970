"""Which part of a backbone is trained: all, nothing, its norms, its last layers, or low-rank adapters (LoRA).

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
        UserError: peft is not installed, or this backbone has no adapters, no norms, or fewer layers.
    """
    if options.finetune == "lora":
        _add_adapters(expert, options)
    elif options.finetune != "full":
        trained = _norms(expert) if options.finetune.startswith("norms") else set()
        if options.finetune.endswith("last_n"):
            trained |= _last_layers(expert, "last_n", options.last_n)
        for name, parameter in expert.backbone.named_parameters():
            parameter.requires_grad_(name in trained)


def _norms(expert: Expert) -> set[str]:
    """Return the names of the scales and shifts of all norms, which all libraries name as such."""
    names = {
        f"{path}.{name}"
        for path, module in expert.backbone.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    if not names:
        raise UserError(f"finetune norms: {expert.spec.name} has no norms to train; use finetune last_n")
    return names


def _last_layers(expert: Expert, key: str, count: int) -> set[str]:
    """Return the names of the parameters of the last layers and of what follows them (norm, projection).

    Args:
        key: of the recipe, that `count` is the value of.
    """
    layers = expert.backbone.layers()
    if count > (depth := len(layers) - 2):  # without the stem and what follows
        raise UserError(f"{key} {count}: {expert.spec.name} has {depth} layers; use at most {depth}")
    return {name for names in layers[-(count + 1) :] for name in names}


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
    kind, hint = "", "use finetune last_n"
    if options.lora_layers != "all":
        targets = [name for name in targets if _part_of_block(name) == options.lora_layers]
        kind, hint = f" of kind {options.lora_layers}", "use lora_layers all"
    if options.lora_last_n:
        last = _last_layers(expert, "lora_last_n", options.lora_last_n)
        targets = [name for name in targets if f"{name}.weight" in last]
    if not targets:
        raise UserError(f"finetune lora: {expert.spec.name} has no linear layers{kind} to adapt; {hint}")
    config = peft.LoraConfig(
        r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=targets, lora_dropout=0.0
    )
    peft.inject_adapter_in_model(config, expert.backbone)


def _part_of_block(layer: str) -> str | None:
    """Return the innermost part that holds a linear layer, by its name in timm or open_clip."""
    for part in reversed(layer.split(".")):
        if "mlp" in part:
            return "mlp"
        if "attn" in part:
            return "attention"
    return None
