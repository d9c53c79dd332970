"""Clean and robust AUC of an expert on the hold-out, over all processes."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset

from featdistill.command_line import UserError
from featdistill.data.loading import Joined, ScoreDataset
from featdistill.distortions.policy import DistortionPolicy
from featdistill.distortions.presets import PRESETS
from featdistill.evaluation import metrics
from featdistill.images.equalization import Equalization, read_settings
from featdistill.inference.scoring import batch_rows, score_dataset
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
    parts = list(holdout.parts(expert))
    sets = [each for part in parts for each in part]
    scored, unreadable = _score(expert, sets, recipe, accelerator)
    found, names = [], set()
    for (rows, _), (positions, logits) in zip(sets, scored, strict=True):
        names.update(rows.index[positions])
        found.append(metrics.roc_auc(rows["label"].to_numpy(dtype=np.int64)[positions], logits))
    if not names:
        raise UserError(f"no image of the hold-out can be read; {': '.join(next(iter(unreadable.items())))}")
    clean, robust = (_mean([found.pop(0) for _ in part]) for part in parts)
    return {"images": len(names), "clean_auc": clean, "robust_auc": robust}, list(unreadable.items())


def _mean(auc: list[float | None]) -> float | None:
    return None if None in auc or not auc else float(np.mean(auc))


def _score(
    expert: Expert, sets: list[tuple[pd.DataFrame, Dataset]], recipe: Recipe, accelerator: Accelerator
) -> tuple[list[tuple[np.ndarray, np.ndarray]], dict[str, str]]:
    """Return positions and logits of the rows of each set that could be read, and image -> why of others."""
    images = [image for rows, _ in sets for image in rows["image"]]
    joined = Joined([dataset for _, dataset in sets])
    lengths = [len(rows) for rows, _ in sets]
    batches = range(len(batch_rows(lengths, recipe.score_batch_size)))
    scored, broken = [], []
    for batch in score_dataset(
        [expert],
        joined,
        device=accelerator.device,
        batch_size=recipe.score_batch_size,
        workers=recipe.workers,
        precision=recipe.precision,
        batches=batches[accelerator.process_index :: accelerator.num_processes],
        lengths=lengths,
    ):
        scored += zip(batch.rows, batch.logits[0].tolist(), strict=True)
        broken += [(images[row.index], row.reason) for row in batch.broken]
    scored = sorted(gather_object(scored))
    positions = np.array([row for row, _ in scored], dtype=np.int64)
    logits = np.array([logit for _, logit in scored])
    if not np.isfinite(logits).all():
        raise UserError(
            f"training has diverged: {int((~np.isfinite(logits)).sum())} of {len(logits)} scores of the "
            "hold-out are not finite; lower --learning-rate, or use --precision fp32; experts of earlier "
            "epochs are kept"
        )
    bounds = pairwise(np.searchsorted(positions, joined.starts))
    each = [
        (positions[first:end] - start, logits[first:end])
        for (first, end), start in zip(bounds, joined.starts[:-1], strict=True)
    ]
    return each, dict(sorted(gather_object(broken)))
