"""Runs of the study of the method that start from kept tokens: banks of training views, and scores."""

from pathlib import Path

import numpy as np

from featdistill.bank.embed import Settings, embed
from featdistill.bank.store import open_bank
from featdistill.bank.views import ViewPlan
from featdistill.command_line import UserError
from featdistill.inference.processes import Processes
from featdistill.inference.scoring import score_dataset
from featdistill.models.expert import Expert
from featdistill.recipe_groups import Augmentation, values_of
from featdistill.training.from_tokens import TokenHoldout
from featdistill.training.recipe import Recipe


class TokenBanks:
    """The banks of one seed. Runs of a stage share one, as far as they have the same distortions.

    Args:
        scored: bank of all images that are scored, drawn for evaluation.
        architecture: of the experts.
        train: manifests.
        folder: of the banks.
    """

    def __init__(self, scored: str, architecture: Recipe, train: list[str], folder: Path) -> None:
        if architecture.finetune != "last_n":
            raise UserError("--tokens needs --set finetune=last_n")
        self.scored, self.architecture, self.train, self.folder = scored, architecture, train, folder

    def flags(self, recipe: Recipe, stage: int) -> list[str]:
        """Make the bank of a run, if there is none, and return the flags that name it."""
        policy = "".join(letter if letter.isalnum() else "_" for letter in recipe.distortions)
        bank = self.folder / f"stage{stage}_{policy}"
        is_still = recipe.distortions == "none" and recipe.flip == 0 and recipe.crop == "center"
        # Reading B needs two views, however short the run is.
        count = 0 if is_still else max(2, recipe.epochs)
        drawn = Augmentation(**values_of(Augmentation, recipe))
        settings = Settings(
            backbone=self.architecture.backbone,
            weights=self.architecture.weights,
            input_size=self.architecture.input_size,
            resize=self.architecture.resize,
            tokens_before_last=self.architecture.last_n,
            views=ViewPlan(count, "training", recipe.seed, drawn, stage=stage),
            precision=recipe.precision,
            workers=recipe.workers,
        )
        Processes().run(lambda processes: embed(settings, self.train, bank, processes))
        return ["--tokens", str(bank), "--val-tokens", self.scored]


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
