"""Recipes: every setting of a training run, typed, with one line of explanation each.

A recipe file is a YAML of flat keys; what differs between the stages stands under `stage1:` and `stage2:`;
`base:` names another recipe whose values are taken first. Several recipes are taken one after the other, so
that `--recipe clip_l14_a featdistill_crd` is the first with the second's settings on top. Precedence:
defaults < recipes < `--config my.yaml` < flags.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from featdistill.command_line import Parser, UserError, nearest, one_of

RECIPE_FOLDER = Path(__file__).resolve().parents[1] / "recipes"
# Keys that change how a run is carried out, not what comes out of it: a run may be resumed with other values.
RUNTIME_KEYS = ("workers", "log_every", "checkpoint_every_s", "score_batch_size", "trackers", "cache")
# Former names of keys, which are refused with the present one.
_RENAMED = {
    "equalise": "equalize",
    "synchronise_groups": "synchronize_groups",
    "crop_least_area": "crop_min_area",
    "amplitude_mixup_most": "amplitude_mixup_max",
    "skipped_steps": "max_skipped_steps",
    "final_learning_rate": "final_learning_rate_factor",
}
_STAGES = ("stage1", "stage2")


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with its default and its line of help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """Stage 1: binary cross-entropy on distorted images (paper, section 4.3 and 4.7)."""

    name: str = option("custom", "what the run is called")
    seed: int = option(0, "seeds weights, order of images, crops and distortions")

    backbone: str = option("clip_l14", "short name, timm:NAME or open_clip:NAME")
    weights: str = option("hub", "where the backbone's weights come from: hub, random, or a local file")
    input_size: int | None = option(None, "side of the network's input in px; none: the backbone's own")
    resize: Literal["shorter", "squash", "crop"] = option(
        "shorter", "shorter side to the input size and crop; squash to a square; or crop without resizing"
    )
    head_hidden: int = option(256, "width of the head's hidden layer; 0: a linear head")
    head_dropout: float = option(0.3, "dropout before the last layer of the head")

    equalize: str | None = option(
        None, "equalise.json of a copy: give training and hold-out images sizes and qualities alike"
    )
    distortions: str = option(
        "released_featdistill", "preset of the distortion policy, with changes: official,probability=0.5"
    )
    synchronize_groups: bool = option(
        False, "give the images of a group (a real one and its AI counterpart) the same distortions"
    )
    crop: Literal["random", "center", "random_resized"] = option(
        "random", "where training crops are taken; random_resized: of random area and shape"
    )
    crop_min_area: float = option(0.5, "least share of the image's area that random_resized keeps")
    flip: float = option(0.5, "probability of a horizontal flip in training")
    amplitude_mixup: float = option(0.0, "probability that an image takes on some of another's amplitudes")
    amplitude_mixup_max: float = option(0.5, "largest share of the other image's amplitudes")
    amplitude_mixup_with: Literal["same_label", "any"] = option(
        "same_label", "which training images lend their amplitudes"
    )
    balance: Literal["none", "class", "source", "class_source"] = option(
        "none", "what all come up equally often: classes, sources, or the sources within each class"
    )

    limit_per_class: int | None = option(
        None, "most training images of each class, drawn by the seed; none: all of them"
    )

    mask: Literal["none", "texture", "smooth", "random"] = option(
        "none", "which patches are hidden from the student in training: textured, smooth or random ones"
    )
    mask_ratio: float = option(0.5, "share of an image's patches that is hidden")
    mask_level: Literal["pixel", "token"] = option(
        "pixel", "paint patches over, or leave their tokens out of the transformer, which is faster"
    )
    mask_select: Literal["top", "sample"] = option(
        "top", "hide the most textured patches, or draw them in proportion to their texture"
    )
    mask_score: Literal["differences", "sobel", "variance"] = option(
        "differences", "how the texture of a patch is measured"
    )
    mask_prob: float = option(1.0, "probability that an image is masked (a whole batch, at level token)")

    label_smoothing: float = option(0.0, "moves both labels towards 0.5 by half of this")
    focal_gamma: float = option(0.0, "focal loss: how much less easy images count; 0: cross-entropy")
    ai_weight: float = option(1.0, "weight of AI-generated images in cross-entropy; real ones count 1")
    bce_weight: float = option(1.0, "weight of binary cross-entropy")
    consistency_weight: float = option(
        0.0, "weight of the divergence of the distorted image's probability from the clean image's"
    )
    ema: float = option(0.0, "decay of a moving average of the weights, which is scored and saved; 0: none")

    finetune: Literal["full", "frozen", "last_n", "lora"] = option(
        "full", "what of the backbone is trained: all, nothing, its last layers, or low-rank additions"
    )
    last_n: int = option(4, "how many layers finetune last_n trains")
    lora_rank: int = option(16, "rank of the additions of finetune lora")
    lora_alpha: float = option(32.0, "scale of the additions of finetune lora, divided by their rank")
    layer_decay: float = option(1.0, "factor of the learning rate from each layer to the one before it")

    epochs: int = option(2, "passes over the training rows")
    batch_size: int = option(128, "images an optimiser step, over all processes and accumulation steps")
    accumulation: int = option(1, "forward passes an optimiser step is made of, per process")
    optimizer: Literal["adamw", "adam"] = option("adamw", "adam adds the weight decay to the gradient")
    learning_rate: float = option(1e-5, "peak learning rate of the backbone")
    head_learning_rate_factor: float = option(10.0, "learning rate of the head, relative to the backbone's")
    weight_decay: float = option(0.05, "weight decay; none on norms, biases and embeddings")
    warmup: float = option(0.05, "share of the steps over which the learning rate rises linearly")
    schedule: Literal["cosine", "step"] = option(
        "cosine", "how the learning rate falls after that: on a cosine, or by a factor every few epochs"
    )
    step_epochs: int = option(2, "epochs between two falls of schedule step")
    step_factor: float = option(0.7, "what schedule step multiplies the learning rate by")
    final_learning_rate_factor: float = option(
        0.01, "learning rate at the end of the cosine, relative to the peak"
    )
    clip_norm: float = option(1.0, "largest norm of the gradient; 0: not clipped")
    precision: Literal["fp32", "bf16", "fp16"] = option("bf16", "arithmetic of the forward pass")
    gradient_checkpointing: bool = option(False, "compute activations twice: far less memory, slower")
    compile: bool = option(False, "compile forward and backward pass: faster after minutes of compiling")
    max_skipped_steps: int = option(5, "steps in a row whose gradient may be not finite before the run stops")

    cache: str | None = option(None, "folder for decoded, resized images, made once (distortions at input)")
    trackers: str | None = option(None, "where metrics go besides metrics.jsonl: tensorboard,wandb,trackio")
    workers: int = option(8, "loader processes per training process; 0: load in the training process")
    log_every: int = option(20, "optimiser steps between two lines of metrics.jsonl")
    checkpoint_every_s: float = option(300.0, "seconds between two checkpoints")
    score_batch_size: int = option(128, "images a batch when the hold-out is scored")


@dataclass(frozen=True)
class DistillRecipe(Recipe):
    """Stage 2: self-distillation beside cross-entropy (paper, reading A: eq. 2; reading B: section 5.1)."""

    objective: Literal["dense", "crd", "dense+crd"] = option(
        "dense", "what is distilled: dense token maps (reading A), contrastive features (reading B), or both"
    )
    teacher_kind: Literal["frozen", "momentum"] = option(
        "frozen", "the stage-1 expert as it is, or one that follows the student"
    )
    teacher_view: Literal["clean", "same", "other"] = option(
        "clean", "what the teacher sees: the undistorted image, the student's, or another distortion of it"
    )
    metric: Literal["mse", "layernorm_mse", "cosine"] = option("layernorm_mse", "how tokens are compared")
    dense_weight: float = option(1.0, "weight of the dense part")
    dense_layers: int = option(1, "how many of the last layers are compared")
    crd_weight: float = option(0.8, "weight of the contrastive part")
    crd_dim: int = option(128, "width of the contrastive part's projections")
    crd_temperature: float = option(0.07, "temperature of the contrastive part")
    crd_queue: int = option(16384, "past keys that serve as negatives")
    crd_negatives: Literal["all", "other_label"] = option("all", "which past keys count as negatives")
    momentum_base: float = option(0.99, "momentum of the teacher at the first step")
    momentum_max: float = option(0.9999, "momentum of the teacher at the last step")


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the project."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def add_arguments(parser: Parser, recipe_class: type[Recipe]) -> None:
    """Add `--recipe`, `--config` and a flag for every key of the recipe."""
    parser.add_argument(
        "--recipe",
        required=True,
        nargs="+",
        metavar="NAME",
        help=f"what is trained and how; of several, the later ones go on top: {', '.join(list_recipes())}",
    )
    parser.add_argument("--config", help="a YAML of your own that overrides the recipe")
    group = parser.add_argument_group("settings of the recipe (default: what the recipe says)")
    for field, kind in _typed_fields(recipe_class):
        if field.name == "name":
            continue
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
        choices = ("true", "false") if kind is bool else choices
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=f"recipe_{field.name}",
            default=argparse.SUPPRESS,
            nargs="?" if kind is bool else None,
            const="true" if kind is bool else None,
            metavar="{" + ",".join(choices) + "}" if choices else field.name.upper(),
            help=field.metadata["help"],
        )
    for old in _RENAMED:
        flag = "--" + old.replace("_", "-")
        group.add_argument(
            flag, dest=f"recipe_{old}", nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def resolve(recipe_class: type[Recipe], arguments: argparse.Namespace) -> Recipe:
    """Merge defaults, recipe, `--config` and flags to one checked recipe.

    Raises:
        UserError: an unknown recipe or key (the nearest one is named), or a value of the wrong type or range.
    """
    stage = "stage2" if issubclass(recipe_class, DistillRecipe) else "stage1"
    values: dict[str, Any] = {}
    for name in arguments.recipe:
        values |= _read_recipe(name, stage)
    values["name"] = "+".join(arguments.recipe)
    if arguments.config:
        values |= _read_yaml(Path(arguments.config), stage)
    values |= {
        key.removeprefix("recipe_"): value
        for key, value in vars(arguments).items()
        if key.startswith("recipe_")
    }
    return from_values(recipe_class, values)


def from_values(recipe_class: type[Recipe], values: dict[str, Any]) -> Recipe:
    """Build a recipe from plain values, checking keys, types and ranges."""
    kinds = {field.name: kind for field, kind in _typed_fields(recipe_class)}
    _check_keys(values, kinds)
    recipe = recipe_class(**{key: _convert(key, value, kinds[key]) for key, value in values.items()})
    _check(recipe)
    return recipe


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `key: old -> new` for every key that decides the result and differs."""
    keys = [key for key in {**old, **new} if key not in RUNTIME_KEYS]
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def _typed_fields(recipe_class: type[Recipe]) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(recipe_class)
    return [(field, hints[field.name]) for field in dataclasses.fields(recipe_class)]


def _read_recipe(name: str, stage: str) -> dict[str, Any]:
    one_of("recipe", name, list_recipes())
    return _read_yaml(RECIPE_FOLDER / f"{name}.yaml", stage)


def _read_yaml(path: Path, stage: str) -> dict[str, Any]:
    """Return the flat keys of a file for one stage, its base recipe's values first."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values, not a {type(content).__name__}")
    sections = {name: content.pop(name, None) or {} for name in _STAGES}
    base = content.pop("base", None)
    values = _read_recipe(base, stage) if base else {}
    for mapping, kind in (
        (content, Recipe),
        (sections["stage1"], Recipe),
        (sections["stage2"], DistillRecipe),
    ):
        _check_keys(mapping, [field.name for field, _ in _typed_fields(kind)], f"{path}: ")
    return values | content | sections[stage]


def _check_keys(keys: Iterable, known: Iterable[str], where: str = "") -> None:
    """Refuse unknown keys and former names of keys."""
    for key in keys:
        if key in _RENAMED:
            raise UserError(f"{where}recipe key '{key}' is now called '{_RENAMED[key]}'")
        if key not in known:
            raise UserError(f"{where}unknown recipe key '{key}'{nearest(str(key), known)}")


def _convert(key: str, value: Any, kind: Any) -> Any:
    """Turn a YAML value or a flag's text into the key's type."""
    if isinstance(kind, types.UnionType):
        if value is None or str(value).lower() in ("none", "null"):
            return None
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        return one_of(f"value of {key}", str(value), typing.get_args(kind))
    if kind is bool:
        if isinstance(value, bool) or str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise UserError(f"recipe key '{key}' must be true or false, not {value!r}")
    try:
        if kind is int and (isinstance(value, bool) or float(value) != int(float(value))):
            raise ValueError
        return kind(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"recipe key '{key}' must be of type {kind.__name__}, not {value!r}") from error


_AT_LEAST = {"epochs": 1, "batch_size": 1, "accumulation": 1, "workers": 0, "log_every": 1, "seed": 0}
_AT_LEAST |= {"learning_rate": 0, "weight_decay": 0, "clip_norm": 0, "head_hidden": 0, "score_batch_size": 1}
_AT_LEAST |= {"focal_gamma": 0, "bce_weight": 0, "consistency_weight": 0, "last_n": 1, "lora_rank": 1}
_AT_LEAST |= {"max_skipped_steps": 0, "dense_weight": 0, "dense_layers": 1, "crd_weight": 0, "crd_dim": 1}
_AT_LEAST |= {"crd_queue": 1, "step_epochs": 1, "limit_per_class": 1}
_ABOVE_0 = ("ai_weight", "lora_alpha", "layer_decay", "crop_min_area", "crd_temperature", "step_factor")
_SHARES = (
    "head_dropout",
    "flip",
    "warmup",
    "final_learning_rate_factor",
    "label_smoothing",
    "amplitude_mixup",
)
_SHARES += ("amplitude_mixup_max", "crop_min_area", "layer_decay", "momentum_base", "momentum_max", "ema")
_SHARES += ("mask_ratio", "mask_prob", "step_factor")


def _check(recipe: Recipe) -> None:
    values = dataclasses.asdict(recipe)
    for key, least in _AT_LEAST.items():
        if values.get(key) is not None and values[key] < least:
            raise UserError(f"recipe key '{key}' must be at least {least}, not {values[key]}")
    for key in _ABOVE_0:
        if key in values and values[key] <= 0:
            raise UserError(f"recipe key '{key}' must be above 0, not {values[key]}")
    for key in _SHARES:
        if key in values and not 0 <= values[key] <= 1:
            raise UserError(f"recipe key '{key}' must lie between 0 and 1, not {values[key]}")
    if recipe.finetune == "lora" and (recipe.ema or values.get("teacher_kind") == "momentum"):
        raise UserError(
            "finetune lora leaves alone the weights that ema and a momentum teacher follow; give ema 0 and "
            "teacher_kind frozen"
        )
    if recipe.batch_size % recipe.accumulation:
        raise UserError(
            f"batch_size {recipe.batch_size} is no multiple of accumulation {recipe.accumulation}"
        )
