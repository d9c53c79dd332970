"""The teachers' logits from banks: their heads on features that `python -m featdistill embed` has kept.

A bank holds views that training draws: with its seed, policy and crops, the student sees the same distorted
images, and each distorted view has a target of its own.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from featdistill.atomic import sha256_of
from featdistill.bank.store import RECORD_FILE, Bank, open_bank
from featdistill.bank.views import CLEAN
from featdistill.command_line import UserError
from featdistill.data.loading import load_image
from featdistill.data.preprocessing import prepare
from featdistill.inference.fusion import Fusion
from featdistill.models.expert import Expert
from featdistill.records.predictions import name_list
from featdistill.training.recipe import StudentRecipe
from featdistill.training.student import fused_logit

# Kept features are rounded to float16, by a share of 2^-11.
_TOLERANCE = 0.02
_ROWS_AT_ONCE = 4096
_DRAWN = ("distortions", "crop", "flip", "crop_min_area")


class BankTargets:
    """The fused logit of every view of the rows of some banks.

    Args:
        experts: the teachers, by name.
        banks: folders; each teacher's features are in one of them.
        fusion: of the teachers.
        recipe: the student's; it decides which views of a bank it would see.

    Attributes:
        drawn: how many distorted views have a target, one for each epoch, after which they repeat; 0: only
            the clean image has one.

    Raises:
        UserError: no bank is that of a teacher, or banks have other rows or views than each other.
    """

    def __init__(
        self, experts: dict[str, Expert], banks: Sequence[str], fusion: Fusion, recipe: StudentRecipe
    ) -> None:
        opened = {path: open_bank(path) for path in banks}
        chosen = {name: _bank_of(name, expert, opened) for name, expert in experts.items()}
        if unused := [path for path, bank in opened.items() if bank not in chosen.values()]:
            raise UserError(f"--banks: {name_list(unused)} is not the bank of any teacher")
        first = next(iter(chosen.values()))
        for bank in chosen.values():
            if bank.fingerprint != first.fingerprint or bank.record["views"] != first.record["views"]:
                raise UserError(f"--banks: {bank.path} has other images or views than {first.path}")
        self.rows, self.path = first.rows, first.path
        self.drawn = _drawn_views(first, recipe)
        views = first.views[: 1 + self.drawn]
        logits = [
            torch.stack([_logits(experts[name], bank, view) for view in views], dim=1)
            for name, bank in chosen.items()
        ]
        stacked = torch.stack([values.flatten() for values in logits])
        fused = fused_logit(stacked.double(), fusion, list(experts))
        self._fused = fused.reshape(len(self.rows), len(views)).float().numpy()

    def __call__(self, rows: pd.DataFrame) -> np.ndarray:
        """Return the fused logits of the rows, (rows, 1 + drawn) float32; NaN if an image cannot be read.

        Raises:
            UserError: the rows are not those of the banks; where distorted views have targets, their order
                matters as well, since an image's place among the rows decides how it is distorted.
        """
        own = {image: row for row, image in enumerate(self.rows["image"])}
        places = np.array([own.get(image, -1) for image in rows["image"]])
        remedy = "embed the manifests of --train and then --unlabeled, in their order"
        if (places < 0).any():
            missing = rows["name"][places < 0]
            raise UserError(
                f"--banks: {self.path} does not hold {len(missing)} of {len(rows)} training images: "
                f"{name_list(missing)}; {remedy}"
            )
        if self.drawn and not np.array_equal(places, np.arange(len(rows))):
            raise UserError(
                f"--banks: the training images come in another order than in {self.path}, so they would be "
                f"distorted in another way; {remedy}, without limit_per_class, or use --distill-target clean"
            )
        return self._fused[places]


def _bank_of(name: str, expert: Expert, banks: dict[str, Bank]) -> Bank:
    """Return the bank that was made by a teacher's backbone: it leads to the same logit of an image."""
    for bank in banks.values():
        theirs, own = ((one.spec.library, one.spec.name, one.preprocessing.key) for one in (bank, expert))
        if theirs != own or not {*expert.feature.atoms} <= {*bank.atoms}:
            continue
        row = bank.rows[~bank.rows["broken"]].iloc[0]
        image = prepare(load_image(row["image"], row["name"]), *expert.preprocessing.key)
        with torch.no_grad():
            wanted = expert(image[None]).item()
        found = _logits(expert, bank, CLEAN)[row.name].item()
        if abs(found - wanted) <= _TOLERANCE * (1 + abs(wanted)):
            return bank
    raise UserError(
        f"--banks: none of {', '.join(banks)} holds the features of teacher {name}; make one with python -m "
        f"featdistill embed --expert EXPERT --features {expert.feature.text}"
    )


@torch.inference_mode()
def _logits(expert: Expert, bank: Bank, view: str) -> torch.Tensor:
    """Return an expert's logits of a view of all rows, (rows,) float32."""
    values = torch.from_numpy(bank.values(expert.feature, view))
    return torch.cat([expert.head(part)[:, 0] for part in values.split(_ROWS_AT_ONCE)])


def _drawn_views(bank: Bank, recipe: StudentRecipe) -> int:
    """Return how many distorted views of a bank the student sees; 0 if it is compared with clean targets."""
    views = bank.record["views"]
    count = sum(name.startswith("training-") for name in bank.views)
    if recipe.distill_target == "clean" or not count:
        return 0
    wanted = {"seed": recipe.seed} | {key: getattr(recipe, key) for key in _DRAWN}
    differs = [key for key, value in wanted.items() if views[key] != value]
    altered = [name for name in ("augmix", "cutmix", "amplitude_mixup") if getattr(recipe, name)]
    altered += ["synchronize_groups"] if recipe.synchronize_groups else []
    altered += ["equalize"] if recipe.equalize else []
    if differs or altered:
        drawn = ", ".join(f"{key} {views[key]} (the recipe has {wanted[key]})" for key in differs)
        reason = f"was drawn with {drawn}" if differs else f"has no {', '.join(altered)}"
        raise UserError(
            f"--banks: {bank.path} {reason}, so its distorted views are not what the student would see; "
            "change that, or use --distill-target clean"
        )
    return count


def describe(banks: Sequence[str]) -> list[dict[str, str]]:
    """Return the banks for `run.json`."""
    return [{"path": str(path), "sha256": sha256_of(Path(path) / RECORD_FILE)} for path in banks]
