"""Clean and robust AUC of an expert on the hold-out, over all processes."""

from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from accelerate.utils import gather_object

from featdistill.command_line import UserError
from featdistill.distortions.presets import PRESETS
from featdistill.evaluation import metrics
from featdistill.images.equalization import read_settings
from featdistill.inference.scoring import score
from featdistill.models.expert import Expert
from featdistill.training.recipe import Recipe


def score_holdout(
    expert: Expert, holdout: pd.DataFrame, recipe: Recipe, accelerator: Accelerator
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Score an expert; each process scores a share of the rows.

    If no row is distorted, the rows are scored a second time with the official distortions, drawn from (0,
    name).

    Returns:
        `images` (how many were scored), `clean_auc` and `robust_auc`; and (image, reason) of the unreadable.

    Raises:
        UserError: a score is not finite, or no image can be read.
    """
    is_distorted = (holdout["is_distorted"] == 1).fillna(False).to_numpy(dtype=bool)
    parts = [(holdout[~is_distorted], None), (holdout[is_distorted], None)]
    if not is_distorted.any():
        parts[1] = (holdout, PRESETS["official"])
    expert.eval()
    auc, names, unreadable = [], set(), {}
    for rows, policy in parts:
        batches = range(-(-len(rows) // recipe.score_batch_size))
        scored, broken = [], []
        for batch in score(
            [expert],
            rows,
            device=accelerator.device,
            batch_size=recipe.score_batch_size,
            workers=recipe.workers,
            precision=recipe.precision,
            policy=policy,
            equalization=read_settings(recipe.equalize) if recipe.equalize else None,
            batches=batches[accelerator.process_index :: accelerator.num_processes],
        ):
            scored += zip(batch.rows, batch.logits[0].tolist(), strict=True)
            broken += [(rows["image"].iloc[row.index], row.reason) for row in batch.broken]
        scored = sorted(gather_object(scored))
        unreadable |= dict(sorted(gather_object(broken)))
        positions, logits = [row for row, _ in scored], np.array([logit for _, logit in scored])
        if not np.isfinite(logits).all():
            raise UserError(
                f"training has diverged: {int((~np.isfinite(logits)).sum())} of {len(logits)} scores of the "
                "hold-out are not finite; lower --learning-rate, or use --precision fp32; experts of earlier "
                "epochs are kept"
            )
        names.update(rows.index[positions])
        auc.append(metrics.roc_auc(rows["label"].to_numpy(dtype=np.int64)[positions], logits))
    if not names:
        raise UserError(f"no image of the hold-out can be read; {': '.join(next(iter(unreadable.items())))}")
    return {"images": len(names), "clean_auc": auc[0], "robust_auc": auc[1]}, list(unreadable.items())
