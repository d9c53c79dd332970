"""Clean and robust AUC of an expert on the hold-out, over all processes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset

from featdistill.command_line import UserError
from featdistill.data.loading import ScoreDataset
from featdistill.distortions.policy import DistortionPolicy
from featdistill.distortions.presets import PRESETS
from featdistill.evaluation import metrics
from featdistill.images.equalization import Equalization, read_settings
from featdistill.inference.scoring import score_dataset
from featdistill.models.expert import Expert
from featdistill.training.from_tokens import TokenHoldout
from featdistill.training.recipe import Recipe


class ImageHoldout:
    """A hold-out that is scored from images.

    If no row is distorted, the rows are scored a second time with the official distortions, drawn from (0,
    name).
    """

    def __init__(self, rows: pd.DataFrame, equalization: Equalization | None = None) -> None:
        self.rows, self.equalization = rows, equalization

    def parts(self, expert: Expert) -> Iterator[list[tuple[pd.DataFrame, Dataset]]]:
        """Yield what the clean AUC and then what the robust AUC is the mean over: rows, and their images."""
        is_distorted = (self.rows["is_distorted"] == 1).fillna(False).to_numpy(dtype=bool)
        yield [self._part(self.rows[~is_distorted], expert)]
        if is_distorted.any():
            yield [self._part(self.rows[is_distorted], expert)]
        else:
            yield [self._part(self.rows, expert, PRESETS["official"])]

    def _part(
        self, rows: pd.DataFrame, expert: Expert, policy: DistortionPolicy | None = None
    ) -> tuple[pd.DataFrame, Dataset]:
        keys = [expert.preprocessing.key]
        return rows, ScoreDataset(rows, keys, policy, equalization=self.equalization)


def score_holdout(
    expert: Expert, holdout: pd.DataFrame | TokenHoldout, recipe: Recipe, accelerator: Accelerator
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Score an expert; each process scores a share of the rows. See `ImageHoldout` and `TokenHoldout`.

    Returns:
        `images` (how many were scored), `clean_auc` and `robust_auc`; and (image, reason) of the unreadable.

    Raises:
        UserError: a score is not finite, or no image can be read.
    """
    if isinstance(holdout, pd.DataFrame):
        holdout = ImageHoldout(holdout, read_settings(recipe.equalize) if recipe.equalize else None)
    expert.eval()
    auc, names, unreadable = [], set(), {}
    for part in holdout.parts(expert):
        found = []
        for rows, dataset in part:
            positions, logits, broken = _score(expert, rows, dataset, recipe, accelerator)
            unreadable |= broken
            names.update(rows.index[positions])
            found.append(metrics.roc_auc(rows["label"].to_numpy(dtype=np.int64)[positions], logits))
        auc.append(None if None in found or not found else float(np.mean(found)))
    if not names:
        raise UserError(f"no image of the hold-out can be read; {': '.join(next(iter(unreadable.items())))}")
    return {"images": len(names), "clean_auc": auc[0], "robust_auc": auc[1]}, list(unreadable.items())


def _score(
    expert: Expert, rows: pd.DataFrame, dataset: Dataset, recipe: Recipe, accelerator: Accelerator
) -> tuple[list[int], np.ndarray, dict[str, str]]:
    """Return positions and logits of the rows that could be read, and image -> reason of the others."""
    batches = range(-(-len(rows) // recipe.score_batch_size))
    scored, broken = [], []
    for batch in score_dataset(
        [expert],
        dataset,
        device=accelerator.device,
        batch_size=recipe.score_batch_size,
        workers=recipe.workers,
        precision=recipe.precision,
        batches=batches[accelerator.process_index :: accelerator.num_processes],
    ):
        scored += zip(batch.rows, batch.logits[0].tolist(), strict=True)
        broken += [(rows["image"].iloc[row.index], row.reason) for row in batch.broken]
    scored = sorted(gather_object(scored))
    positions, logits = [row for row, _ in scored], np.array([logit for _, logit in scored])
    if not np.isfinite(logits).all():
        raise UserError(
            f"training has diverged: {int((~np.isfinite(logits)).sum())} of {len(logits)} scores of the "
            "hold-out are not finite; lower --learning-rate, or use --precision fp32; experts of earlier "
            "epochs are kept"
        )
    return positions, logits, dict(sorted(gather_object(broken)))
