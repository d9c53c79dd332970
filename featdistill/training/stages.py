"""What `train.py` and `distill.py` share: common flags, and the way from a recipe to a finished run."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import nn

from featdistill import atomic
from featdistill.command_line import Parser, UserError
from featdistill.data.image_cache import build_cache
from featdistill.data.preprocessing import Preprocessing
from featdistill.data.sampling import balance_weights, limit_per_class
from featdistill.data.train_dataset import TrainDataset, check_cache
from featdistill.distortions.presets import parse_policy
from featdistill.images.equalization import read_settings
from featdistill.models import expert as experts
from featdistill.models.expert import Expert
from featdistill.models.masking import make_masking
from featdistill.process_setup import keep_freed_memory
from featdistill.records.manifest import read_manifests
from featdistill.training import trainer as engine
from featdistill.training.recipe import Recipe
from featdistill.training.run_folder import RunFolder, git_commit


def add_arguments(parser: Parser) -> None:
    """Add the flags that say what is trained on and where it goes."""
    parser.add_argument(
        "--train", nargs="+", required=True, metavar="MANIFEST", help="labelled training manifests"
    )
    parser.add_argument(
        "--val", nargs="+", required=True, metavar="MANIFEST", help="labelled hold-out manifests"
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--resume",
        choices=("auto", "off"),
        default="auto",
        help="continue the run in RUN if there is one, or refuse to",
    )


def task_settings(expert: Expert, recipe: Recipe) -> dict[str, Any]:
    """Return what the tasks of both stages take from a recipe alike."""
    keys = ("label_smoothing", "focal_gamma", "ai_weight", "bce_weight", "consistency_weight", "ema")
    masking = make_masking(
        expert,
        recipe.mask,
        ratio=recipe.mask_ratio,
        level=recipe.mask_level,
        select=recipe.mask_select,
        score=recipe.mask_score,
        probability=recipe.mask_prob,
        seed=recipe.seed,
    )
    return {key: getattr(recipe, key) for key in keys} | {"masking": masking}


def run(
    arguments: argparse.Namespace,
    recipe: Recipe,
    make_task: Callable[[], nn.Module],
    *,
    stage: int,
    teacher: dict[str, Any] | None = None,
) -> None:
    """Train what `make_task` builds, as the recipe says.

    Args:
        make_task: called once, with torch seeded by the recipe.
        teacher: description of the teacher for `run.json`.
    """
    policy = parse_policy(recipe.distortions)
    train_rows, holdout = _labelled(arguments.train, "--train"), _labelled(arguments.val, "--val")
    train_rows = limit_per_class(train_rows, recipe.limit_per_class, recipe.seed)
    folder = RunFolder(arguments.out)
    accelerator = engine.make_accelerator(recipe, folder)
    if accelerator.device.type == "cpu":
        # Activations of one step are the memory of the next.
        keep_freed_memory()
    description = {
        "stage": stage,
        "recipe": dataclasses.asdict(recipe),
        "data": {"train": _describe(arguments.train), "val": _describe(arguments.val)},
        "teacher": teacher,
        "versions": experts.versions(),
        "git_commit": git_commit(),
    }
    folder.check(description, arguments.resume)
    torch.manual_seed(recipe.seed)
    task = make_task()
    keeps_layout_only = task.keeps_layout_only or policy.keeps_layout_only
    policy = dataclasses.replace(policy, keeps_layout_only=keeps_layout_only)
    preprocessing: Preprocessing = task.expert.preprocessing
    equalization = read_settings(recipe.equalize) if recipe.equalize else None
    cache = None
    if recipe.cache:
        check_cache(policy, recipe.crop)
        with accelerator.local_main_process_first():
            cache = build_cache(
                recipe.cache,
                train_rows,
                preprocessing,
                equalization=equalization,
                max_side_px=policy.max_side_px,
                key_parts=[part["sha256"] for part in description["data"]["train"]],
                workers=recipe.workers,
            )
    dataset = TrainDataset(
        train_rows,
        preprocessing,
        policy,
        recipe.seed,
        crop=recipe.crop,
        crop_min_area=recipe.crop_min_area,
        flip=recipe.flip,
        views=task.views,
        equalization=equalization,
        synchronize_groups=recipe.synchronize_groups,
        amplitude_mixup=recipe.amplitude_mixup,
        amplitude_mixup_max=recipe.amplitude_mixup_max,
        amplitude_mixup_with=recipe.amplitude_mixup_with,
        cache=cache,
    )
    weights = balance_weights(train_rows, recipe.balance)
    accelerator.print(
        f"stage {stage}, {recipe.name}: {recipe.backbone} at {preprocessing.size} px, "
        f"{len(train_rows)} training and {len(holdout)} hold-out images -> {folder.path}"
    )
    card = {key: description[key] for key in ("stage", "recipe", "data", "teacher", "git_commit")}
    trainer = engine.Trainer(task, dataset, holdout, recipe, folder, accelerator, card, weights)
    # All processes have looked at the folder, and nothing has been refused, before it becomes a run's.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.start(description)
    trainer.fit()
    accelerator.end_training()


def _labelled(paths: list[str], flag: str) -> pd.DataFrame:
    rows = read_manifests(paths)
    unlabelled = rows["label"].isna()
    if unlabelled.any():
        raise UserError(
            f"{flag}: {int(unlabelled.sum())} of {len(rows)} rows have no label in {', '.join(paths)}"
        )
    if rows["label"].nunique() < 2:
        raise UserError(
            f"{flag}: all {len(rows)} rows of {', '.join(paths)} have the same label; both are needed"
        )
    return rows


def _describe(paths: list[str]) -> list[dict[str, str]]:
    return [{"path": str(path), "sha256": atomic.sha256_of(path)} for path in paths]
