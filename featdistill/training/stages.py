"""From a recipe to a finished run, for both stages."""

import argparse
import dataclasses
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import nn

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.data.image_cache import build_cache
from featdistill.data.loading import ScoreDataset
from featdistill.data.sampling import balance_weights, limit_per_class
from featdistill.data.train_dataset import TrainDataset, check_cache
from featdistill.distortions.policy import DistortionPolicy
from featdistill.distortions.presets import parse_policy
from featdistill.images.equalization import read_settings
from featdistill.models import expert as experts
from featdistill.process_setup import keep_freed_memory
from featdistill.records.manifest import fingerprint, join_rows, read_manifest
from featdistill.records.provenance import Claim, read_record
from featdistill.training import from_tokens, top_tokens
from featdistill.training.processes import end_group, make_accelerator, raise_first
from featdistill.training.recipe import Recipe
from featdistill.training.run_folder import RunFolder, git_commit
from featdistill.training.trainer import Trainer

# Parts of the loss that need labels.
_OF_LABELS = ("bce", "supcon", "auxiliary")

_log = logging.getLogger(__name__)


class Targets(Protocol):
    """The fused logits of a student's teachers, computed beforehand.

    Attributes:
        drawn: how many distorted views of each image have a target.
    """

    drawn: int

    def __call__(self, rows: pd.DataFrame) -> np.ndarray:
        """Return the targets of training rows, (rows,) or (rows, 1 + drawn) float32, clean ones first."""


def run(
    arguments: argparse.Namespace,
    recipe: Recipe,
    make_task: Callable[[], nn.Module],
    *,
    stage: int,
    teacher: dict[str, Any] | None = None,
    targets: Targets | None = None,
) -> int:
    """Train what `make_task` builds, as the recipe says, and return the exit status.

    Args:
        arguments: see `recipe.add_run_arguments`; with `unlabeled`, more manifests whose labels do not count.
        make_task: called once, after torch is seeded.
        teacher: description of the teacher for `run.json`.
        targets: see `Targets`; None: teachers, if any, run along.
    """
    policy = parse_policy(recipe.distortions)
    manifests = _manifests(arguments)
    rows, weights = _training_rows(manifests, recipe)
    holdout = _labeled(manifests["val"], "--val")
    folder = RunFolder(arguments.out)
    if recipe.compile == "auto" and (made := read_record(folder.path / "run.json")):
        # A run that began with true or false goes on with that.
        recorded = made.get("recipe", {}).get("compile", "auto")
        recipe = dataclasses.replace(recipe, compile=recorded)
    accelerator = make_accelerator(recipe, folder)
    shared = int(holdout["image"].isin(rows["image"]).sum())
    if shared and accelerator.is_main_process:
        _log.warning(f"{shared} of {len(holdout)} hold-out images are trained on: their scores say little")
    repeated = int(rows["image"].duplicated().sum())
    if repeated and accelerator.is_main_process:
        _log.warning(f"{repeated} of {len(rows)} training rows name an image again: it counts more than once")
    if accelerator.device.type == "cpu":
        # Activations of one step are the memory of the next.
        keep_freed_memory()
    description = describe(arguments, recipe, stage, teacher, manifests)
    del manifests
    state = folder.claim(description, arguments.resume)
    torch.manual_seed(recipe.seed)
    task = make_task()
    _check_loss(task.weights, rows)
    keeps_layout_only = task.keeps_layout_only or policy.keeps_layout_only
    policy = dataclasses.replace(policy, keeps_layout_only=keeps_layout_only)
    # Whoever scores with the expert must reduce large images as training did.
    preprocessing = dataclasses.replace(task.expert.preprocessing, max_side_px=policy.max_side_px)
    task.evaluated.preprocessing = task.expert.preprocessing = preprocessing
    if arguments.tokens:
        dataset = from_tokens.training_set(arguments.tokens, rows, task, policy, recipe, stage)
        clean = from_tokens.TokenScores(dataset.tokens, 0, preprocessing.key)
    else:
        with accelerator.local_main_process_first():
            dataset = _image_set(rows, weights, targets, task, policy, recipe, stage, description["data"])
        clean = ScoreDataset(rows, [preprocessing.key], equalization=dataset.equalization)
    scored = holdout
    if arguments.val_tokens:
        scored = from_tokens.TokenHoldout(arguments.val_tokens, holdout, task.expert)
    _log.info(
        f"stage {stage}, {recipe.name}: {recipe.backbone} at {preprocessing.span}, "
        f"{len(rows)} training and {len(holdout)} hold-out images -> {folder.path}"
    )
    card = {key: value for key, value in description.items() if key != "versions"}
    trainer = Trainer(task, dataset, scored, recipe, folder, accelerator, card, weights)
    with ExitStack() as stack:
        failure = None
        try:
            # Every process has looked at the folder, and nothing was refused, before the run begins in it.
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                stack.enter_context(folder.locked())
                folder.start(description)
        except UserError as error:
            failure = str(error)
        raise_first(failure)
        top_tokens.choose(task, rows, clean, recipe, folder, accelerator, is_new=state is Claim.NEW)
        try:
            status = trainer.fit()
        except UserError:
            if state is Claim.NEW and not trainer.step and accelerator.is_main_process:
                folder.forget()
            raise
        end_group(accelerator, trainer)
        return status


def _check_loss(weights: dict[str, float], rows: pd.DataFrame) -> None:
    """Raise a `UserError` if nothing would be learned: no part of the loss has a weight and images for it."""
    if rows["label"].isna().all():
        weights = {part: weight for part, weight in weights.items() if part not in _OF_LABELS}
    if not any(weights.values()):
        parts = ", ".join(weights) or "none without labels"
        raise UserError(f"no part of the loss has a weight above 0 ({parts}), so nothing would be learned")


def _image_set(
    rows: pd.DataFrame,
    weights: np.ndarray | None,
    targets: Targets | None,
    task: nn.Module,
    policy: DistortionPolicy,
    recipe: Recipe,
    stage: int,
    manifests: dict[str, list[dict[str, str]]],
) -> TrainDataset:
    """Return the training set, with a cache of its images if the recipe asks for one."""
    preprocessing, cache = task.expert.preprocessing, None
    equalization = read_settings(recipe.equalize) if recipe.equalize else None
    if recipe.cache:
        check_cache(policy, recipe)
        cache = build_cache(
            recipe.cache,
            rows,
            preprocessing,
            equalization=equalization,
            max_side_px=policy.max_side_px,
            key_parts=[part["sha256"] for part in manifests["train"] + manifests.get("unlabeled", [])],
            workers=recipe.workers,
        )
    return TrainDataset(
        rows,
        preprocessing,
        policy,
        recipe.seed,
        augmentation=recipe,
        stage=stage,
        views=task.views,
        inputs=task.inputs,
        targets=targets(rows) if targets else None,
        repeat=targets.drawn if targets else 0,
        equalization=equalization,
        cache=cache,
        weights=weights,
    )


def describe(
    arguments: argparse.Namespace,
    recipe: Recipe,
    stage: int,
    teacher: dict[str, Any] | None = None,
    manifests: dict[str, list[pd.DataFrame]] | None = None,
) -> dict[str, Any]:
    """Return the content of `run.json`; `manifests` are those that the arguments name, if already read."""
    files = {"equalize": recipe.equalize} if recipe.equalize else {}
    banks = {"tokens": arguments.tokens, "val_tokens": arguments.val_tokens}
    if stage == 1 and os.path.isfile(recipe.weights):
        files["weights"] = recipe.weights
    return {
        "stage": stage,
        "recipe": dataclasses.asdict(recipe),
        "data": {
            name: [{"path": frame.attrs["path"], "sha256": fingerprint(frame)} for frame in frames]
            for name, frames in (manifests or _manifests(arguments)).items()
        },
        "files": {key: {"path": path, "sha256": atomic.sha256_of(path)} for key, path in files.items()}
        | {key: from_tokens.identity(path) for key, path in banks.items() if path},
        "teacher": teacher,
        "versions": experts.versions(),
        "git_commit": git_commit(),
    }


def _manifests(arguments: argparse.Namespace) -> dict[str, list[pd.DataFrame]]:
    """Return the manifests of `--train` and `--val`, and of `--unlabeled` if there are any."""
    paths = {"train": arguments.train or [], "val": arguments.val}
    if unlabeled := getattr(arguments, "unlabeled", None):
        paths["unlabeled"] = unlabeled
    return {name: [read_manifest(path) for path in paths[name]] for name in paths}


def _training_rows(
    manifests: dict[str, list[pd.DataFrame]], recipe: Recipe
) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Return the training rows and `balance_weights` of them; rows without a label keep their own weight."""
    parts, weights = [], []
    if manifests["train"]:
        rows = _labeled(manifests["train"], "--train")
        parts.append(limit_per_class(rows, recipe.limit_per_class, recipe.seed))
        weights.append(balance_weights(parts[0], recipe.balance))
    if unlabeled := manifests.get("unlabeled"):
        rows = join_rows(unlabeled)
        if count := int(rows["label"].notna().sum()):
            _log.info(f"--unlabeled: {count} labels of {_names(unlabeled)} are not used")
        parts.append(rows.assign(label=pd.array([pd.NA] * len(rows), dtype="Int8")))
        weights.append(balance_weights(rows))
    rows = join_rows(parts)
    if all(part is None for part in weights):
        return rows, None
    ones = [np.ones(len(part)) for part in parts]
    return rows, np.concatenate([one if own is None else own for one, own in zip(ones, weights, strict=True)])


def _labeled(manifests: list[pd.DataFrame], flag: str) -> pd.DataFrame:
    rows, files = join_rows(manifests), _names(manifests)
    unlabeled = int(rows["label"].isna().sum())
    if unlabeled:
        raise UserError(f"{flag}: {unlabeled} of {len(rows)} rows have no label in {files}")
    if rows["label"].nunique() < 2:
        raise UserError(f"{flag}: all {len(rows)} rows of {files} have the same label; both are needed")
    return rows


def _names(manifests: list[pd.DataFrame]) -> str:
    return ", ".join(frame.attrs["path"] for frame in manifests)
