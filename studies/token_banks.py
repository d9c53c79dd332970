"""Runs of the study of the method that start from kept tokens: banks of training views, and scores."""

from pathlib import Path

import numpy as np

from featdistill.bank.embed import Settings, embed
from featdistill.bank.probe import folder_name
from featdistill.bank.store import open_bank
from featdistill.bank.views import ViewPlan
from featdistill.command_line import UserError
from featdistill.inference.processes import Processes
from featdistill.inference.scoring import score_dataset
from featdistill.models.expert import Expert
from featdistill.recipe_groups import Augmentation, values_of
from featdistill.training.from_tokens import TokenHoldout
from featdistill.training.recipe import Recipe


def make_bank(recipe: Recipe, stage: int, architecture: Recipe, train: list[str], folder: Path) -> Path:
    """Make the bank that a run starts from, if there is none; runs with equal stage and distortions share it.

    Args:
        recipe: of the run.
        architecture: recipe of stage 1, whose backbone and weights the experts have.
        train: manifests.
        folder: of the banks of one seed.
    """
    if architecture.finetune != "last_n":
        raise UserError("--tokens needs --set finetune=last_n")
    bank = folder / f"stage{stage}_{folder_name(recipe.distortions)}"
    is_still = recipe.distortions == "none" and recipe.flip == 0 and recipe.crop == "center"
    # Reading B needs two views, however short the run is.
    count = 0 if is_still else max(2, recipe.epochs)
    drawn = Augmentation(**values_of(Augmentation, recipe))
    settings = Settings(
        backbone=architecture.backbone,
        weights=architecture.weights,
        input_size=architecture.input_size,
        resize=architecture.resize,
        tokens_before_last=architecture.last_n,
        views=ViewPlan(count, "training", recipe.seed, drawn, stage=stage),
        precision=recipe.precision,
        workers=recipe.workers,
    )
    Processes().run(lambda processes: embed(settings, train, bank, processes))
    return bank


def token_logits(bank: str, expert: Expert, test, precision: str, draws: int) -> dict[str, np.ndarray]:
    """Return the logits of the test rows from tokens: (1, N) `clean` and up to (draws, N) `distorted`."""
    atoms = [atom for atom in open_bank(bank).atoms if atom.kind == "hidden"]
    expert.tokens_after = atoms[0].layer if atoms else 0
    found = []
    for part in TokenHoldout(bank, test.assign(is_distorted=0), expert).parts(expert):
        part = part[:draws]
        logits = np.full((len(part), len(test)), np.nan)
        for row, (_, dataset) in zip(logits, part, strict=True):
            for batch in score_dataset([expert], dataset, batch_size=64, precision=precision):
                row[batch.rows] = batch.logits[0]
        found.append(logits)
    return dict(zip(("clean", "distorted"), found, strict=True))
