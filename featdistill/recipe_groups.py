"""Every setting of a training run, in groups that are handed on whole to the code that uses them.

A new setting is one entry in its group, and the code that reads it. Its recipe key, its flag, its help, its
checks and its entry in `run.json` follow from the group.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from featdistill.command_line import MAX_WORKERS, UserError, one_of


def option(
    default: Any,
    text: str,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    exclusive: bool = False,
    important: bool = False,
) -> Any:
    """Describe one setting of a group.

    Args:
        text: one line of help.
        minimum, maximum: bounds of a number; with `exclusive`, the minimum itself is not allowed.
        important: whether `--help` shows it first.
    """
    if minimum is None:
        bounds = ""
    elif maximum is None:
        bounds = f"{'above' if exclusive else 'at least'} {minimum}"
    else:
        bounds = f"above {minimum} and at most {maximum}" if exclusive else f"between {minimum} and {maximum}"
    low = -math.inf if minimum is None else math.nextafter(minimum, math.inf) if exclusive else minimum
    high = math.inf if maximum is None else maximum
    metadata = {"help": text, "bounds": bounds, "range": (low, high), "important": important}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Group:
    """A group of settings; values outside their choices or bounds are refused."""

    def __post_init__(self) -> None:
        for field, kind in typed_fields(type(self)):
            value, (low, high) = getattr(self, field.name), field.metadata["range"]
            choices = choices_of(kind)
            if choices and value not in choices.values():
                one_of(f"value of {field.name}", str(value), choices)
            elif isinstance(value, int | float) and not (math.isfinite(value) and low <= value <= high):
                bounds = field.metadata["bounds"] if math.isfinite(value) else "a finite number"
                raise UserError(f"recipe key '{field.name}' must be {bounds}, not {value}")


def typed_fields(group: type[Group]) -> list[tuple[dataclasses.Field, Any]]:
    """Return the fields of a group with their types."""
    hints = typing.get_type_hints(group)
    return [(field, hints[field.name]) for field in dataclasses.fields(group)]


def choices_of(kind: Any) -> dict[str, Any]:
    """Return the values out of which a type lets one choose, by their texts; nothing for other types."""
    values = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    values = (True, False) if kind is bool else values
    return {str(value).lower() if isinstance(value, bool) else value: value for value in values}


def values_of(group: type[Group], settings: Group) -> dict[str, Any]:
    """Return the values that `settings`, of a class derived from `group`, has for the keys of `group`."""
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(group)}


@dataclass(frozen=True)
class General(Group):
    """The run as a whole."""

    name: str = option("custom", "name of the run: the recipes it is made from")
    seed: int = option(
        0, "random seed of the weights, the order of images, crops and distortions", 0, 2**32 - 1
    )


@dataclass(frozen=True)
class Architecture(Group):
    """Architecture."""

    backbone: str = option("clip_l14", "short name, timm:NAME or open_clip:NAME")
    weights: str = option("hub", "source of the backbone's weights: hub, random, or a local file")
    feature: str | None = option(
        None, "what the head gets, such as mean_tokens or class+mean:6,12; none: the backbone's default"
    )
    input_size: int | None = option(None, "side of the input in px; none: the backbone's default", 1)
    input_sizes: str | None = option(
        None, "sides of inputs in px, out of which an image gets its own: 384,768,1152; none: input_size"
    )
    resize: Literal["shorter", "squash", "crop"] = option(
        "shorter", "resize the shorter side and crop, squash to a square, or crop without resizing"
    )
    head_hidden: int = option(256, "width of the head's hidden layer; 0: a linear head", 0)
    head_dropout: float = option(0.3, "dropout before the last layer of the head", 0, 1)


@dataclass(frozen=True)
class Data(Group):
    """Training and hold-out images."""

    equalize: str | None = option(
        None, "equalise.json of a copy, whose sizes and JPEG qualities all images get"
    )
    balance: Literal["none", "class", "source", "class_source", "class_scale"] = option(
        "none",
        "what appears equally often; class_source: the classes, and the sources within each class; "
        "class_scale: the classes among images of similar scale (a column of the manifest)",
    )
    limit_per_class: int | None = option(None, "maximum of training images per class, at random", 1)


@dataclass(frozen=True)
class Augmentation(Group):
    """Augmentation."""

    distortions: str = option(
        "released_featdistill", "preset of the policy, with changes: official,probability=0.5", important=True
    )
    synchronize_groups: bool = option(False, "same distortions for all images of a group")
    crop: Literal["random", "center", "random_resized"] = option(
        "random", "position of crops; random_resized: of random area and aspect ratio"
    )
    crop_min_area: float = option(
        0.5, "minimum area of random_resized, as a share of the image's", 0, 1, exclusive=True
    )
    flip: float = option(0.5, "probability of a horizontal flip", 0, 1)
    other_crop: Literal["own", "same"] = option(
        "own", "crop and flip of the teacher's other view; always the same where tokens are compared"
    )
    amplitude_mixup: float = option(0.0, "probability of mixing in another image's amplitudes", 0, 1)
    amplitude_mixup_max: float = option(0.5, "maximum share of the other's amplitudes", 0, 1)
    amplitude_mixup_with: Literal["same_label", "any"] = option(
        "same_label", "images that the amplitudes may come from"
    )
    augmix: float = option(0.0, "probability of mixing an image with altered copies of itself (AugMix)", 0, 1)
    augmix_severity: float = option(3.0, "maximum strength of AugMix's operations", 0.1, 10)
    augmix_width: int = option(3, "number of altered copies", 1)
    augmix_depth: int = option(0, "operations per copy; 0: 1 to 3, at random", 0)
    cutmix: float = option(
        0.0, "probability of pasting a box of another image, with labels in proportion (CutMix)", 0, 1
    )
    cutmix_alpha: float = option(
        1.0, "parameter of the Beta distribution of the area outside the box", 0, exclusive=True
    )


@dataclass(frozen=True)
class Masking(Group):
    """Masking of patches (MPFT)."""

    mask: Literal["none", "texture", "smooth", "random"] = option(
        "none", "which patches to hide from the student in training"
    )
    mask_ratio: float = option(0.5, "share of an image's patches to hide", 0, 1)
    mask_level: Literal["pixel", "token"] = option(
        "pixel", "paint over patches, or drop their tokens (faster)"
    )
    mask_select: Literal["top", "sample"] = option(
        "top", "hide the most textured patches, or sample by texture"
    )
    mask_score: Literal["differences", "sobel", "variance"] = option("differences", "measure of texture")
    mask_prob: float = option(1.0, "probability of masking an image (with level token, a batch)", 0, 1)


@dataclass(frozen=True)
class Objective(Group):
    """Objective."""

    label_smoothing: float = option(0.0, "moves both labels towards 0.5 by half of this", 0, 1)
    focal_gamma: float = option(0.0, "exponent of the focal loss; 0: cross-entropy", 0)
    focal_alpha: float = option(
        0.0, "weight of AI-generated images, real ones have 1 minus it; 0: see ai_weight", 0, 1
    )
    ai_weight: float = option(1.0, "weight of AI-generated images, relative to real ones", 0, exclusive=True)
    bce_weight: float = option(1.0, "weight of binary cross-entropy", 0)
    consistency_weight: float = option(0.0, "weight of the divergence between clean and distorted images", 0)
    feature_consistency_weight: float = option(
        0.0, "weight of the distance of a network's output for the distorted feature from the clean one", 0
    )
    feature_consistency_hidden: int = option(512, "width of the hidden layer of that network", 1)
    supcon_weight: float = option(0.0, "weight of the supervised contrastive loss of features", 0)
    supcon_temperature: float = option(0.1, "temperature of that loss", 0, exclusive=True)
    auxiliary_features: str | None = option(
        None, "tokens of layers that get a linear head each in training, such as layers:6,12,18,24"
    )
    auxiliary_weight: float = option(1.0, "weight of the mean cross-entropy of these heads", 0)
    ema: float = option(0.0, "decay of the average of weights to score and save; 0: none", 0, 1)
    swa_start: int = option(
        0, "first epoch, from 1, from which the weights at the end of epochs are averaged; 0: none", 0
    )


@dataclass(frozen=True)
class Finetuning(Group):
    """Fine-tuning."""

    finetune: Literal["full", "frozen", "norms", "last_n", "norms_last_n", "lora"] = option(
        "full",
        "part of the backbone to train: all, nothing, all norms, the last layers, both, or low-rank adapters",
    )
    last_n: int = option(4, "number of layers to train with finetune last_n and norms_last_n", 1)
    lora_rank: int = option(16, "rank of the adapters of finetune lora", 1)
    lora_layers: Literal["all", "attention", "mlp"] = option(
        "all", "which linear layers get adapters: all, or those of attention or of the MLPs alone"
    )
    lora_last_n: int = option(0, "number of last layers that get adapters; 0: all layers", 0)
    lora_alpha: float = option(32.0, "scale of the adapters, divided by their rank", 0, exclusive=True)


@dataclass(frozen=True)
class Optimization(Group):
    """Optimization."""

    epochs: int = option(2, "passes over the training images", 1, important=True)
    batch_size: int = option(
        128, "images per optimizer step, over all processes and passes", 1, important=True
    )
    accumulation: int = option(1, "forward passes per optimizer step, per process", 1)
    optimizer: Literal["adamw", "adam"] = option("adamw", "adam adds the weight decay to the gradient")
    sam_rho: float = option(
        0.0, "distance to the nearby weights whose gradient is taken (SAM), at twice the cost; 0: none", 0
    )
    learning_rate: float = option(1e-5, "peak learning rate of the backbone", 0, important=True)
    head_learning_rate_factor: float = option(
        10.0, "learning rate of the head, relative to the backbone's", 0
    )
    layer_decay: float = option(
        1.0, "learning rate of a layer, relative to the next one", 0, 1, exclusive=True
    )
    weight_decay: float = option(0.05, "weight decay; norms, biases and embeddings have none", 0)
    schedule: Literal["cosine", "step"] = option("cosine", "decay of the learning rate after the warm-up")
    warmup: float = option(0.05, "share of the steps with a rising learning rate", 0, 1)
    final_learning_rate_factor: float = option(
        0.01, "final learning rate of cosine, relative to the peak", 0, 1
    )
    step_epochs: int = option(2, "epochs between two reductions of schedule step", 1)
    step_factor: float = option(0.7, "factor of each reduction of schedule step", 0, 1, exclusive=True)
    clip_norm: float = option(1.0, "maximum norm of the gradient; 0: no clipping", 0)
    max_skipped_steps: int = option(5, "steps in a row without a finite gradient before the run stops", 0)
    precision: Literal["fp32", "bf16", "fp16"] = option(
        "bf16", "number format of the forward pass", important=True
    )
    gradient_checkpointing: bool = option(False, "recompute activations: far less memory, slower")
    checkpointing: Literal["blocks", "selective"] = option(
        "blocks",
        "what to recompute: whole blocks, or all but matrix products and attention (more memory, faster)",
    )
    compile: Literal["auto", True, False] = option(
        "auto",
        "compile forward and backward pass: faster after minutes of compilation; auto: long runs on a GPU of "
        "what was measured to be faster",
    )


@dataclass(frozen=True)
class Selection(Group):
    """Choice of the epoch."""

    best_robust_share: float = option(
        1.0, "share of the robust AUC in what chooses the best epoch; the rest is the clean AUC", 0, 1
    )
    patience: int = option(0, "epochs without a better one after which the run ends; 0: train all", 0)


@dataclass(frozen=True)
class Runtime(Group):
    """Execution.

    None of this changes the result, so a run may continue with other values.
    """

    workers: int = option(
        8, "loader processes per training process; 0: load in the training process", 0, MAX_WORKERS
    )
    score_batch_size: int = option(128, "images per batch when the hold-out is scored", 1)
    cache: str | None = option(
        None, "folder for decoded and resized images (needs distort_at=input in distortions)"
    )
    log_every: int = option(20, "optimizer steps between two lines of metrics.jsonl", 1)
    checkpoint_every_s: float = option(300.0, "seconds between two checkpoints", 0)
    trackers: str | None = option(None, "any of tensorboard,wandb,trackio, besides metrics.jsonl")


@dataclass(frozen=True)
class Distillation(Objective):
    """Distillation: reading A of the paper (eq. 2), reading B (section 5.1), or both."""

    objective: Literal["dense", "crd", "dense+crd"] = option(
        "dense", "tokens (reading A), contrastive features (reading B), or both"
    )
    teacher_kind: Literal["frozen", "momentum"] = option(
        "frozen", "keep the stage-1 expert, or let it follow the student"
    )
    teacher_view: Literal["clean", "same", "other"] = option(
        "clean", "input of the teacher: undistorted, the student's, or with other distortions"
    )
    metric: Literal["mse", "layernorm_mse", "cosine"] = option("layernorm_mse", "distance between tokens")
    dense_weight: float = option(1.0, "weight of the distance between token maps", 0)
    dense_layers: int = option(1, "number of last layers to compare", 1)
    crd_weight: float = option(0.8, "weight of the contrastive loss", 0)
    crd_dim: int = option(128, "width of the contrastive projections", 1)
    crd_temperature: float = option(0.07, "temperature of the contrastive loss", 0, exclusive=True)
    crd_queue: int = option(16384, "number of past keys that serve as negatives", 1)
    crd_negatives: Literal["all", "other_label"] = option("all", "which past keys count as negatives")
    momentum_base: float = option(0.99, "momentum of the teacher at the first step", 0, 1)
    momentum_max: float = option(0.9999, "momentum of the teacher at the last step", 0, 1)


@dataclass(frozen=True)
class Student(Objective):
    """Student: one network that learns from the fused logit of several experts (Hinton et al. 2015)."""

    distill_weight: float = option(1.0, "weight of the divergence from the teachers' fused logit", 0)
    distill_temperature: float = option(
        1.0, "divides the logits of both sides; the divergence is multiplied by its square", 0, exclusive=True
    )
    distill_views: Literal["both", "distorted", "clean"] = option(
        "both", "views on which the student is compared with its teachers"
    )
    distill_target: Literal["auto", "view", "clean"] = option(
        "auto",
        "what the teachers see: the same view, or always the clean one; auto: view, with --predictions clean",
    )
    token_weight: float = option(0.0, "weight of the distance to the teachers' tokens, after a projection", 0)


@dataclass(frozen=True)
class About(Group):
    """What recipe files say besides settings, for `run_all.sh` and `python -m featdistill recipes`."""

    team: str | None = option(None, "the team of the challenge whose settings these are")
    rank: int | None = option(None, "the team's rank", 1)
    robust_auc: float | None = option(None, "the team's published robust AUC", 0, 1)
    stages: int = option(2, "1: run_all.sh takes the expert of stage 1", 1, 2)
    committee: str | None = option(None, "instead of settings: recipes of experts that are scored together")
    predict: str | None = option(None, "flags with which run_all.sh calls predict.py")
    weights_by: Literal["given", "robust_auc"] = option(
        "given", "robust_auc: run_all.sh has the weights of the committee measured by fuse --weights-by"
    )


def check_weights(weights: str) -> None:
    """Raise a `UserError` unless a backbone's weights are `hub`, `random` or the path of a file."""
    if weights not in ("hub", "random") and not Path(weights).is_file():
        raise UserError(f"weights file {weights} does not exist; use hub, random, or the path of a file")
