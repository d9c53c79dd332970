"""Clean and robust AUC of an expert on the hold-out, over all processes."""

from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from accelerate.utils import gather_object

from featdistill.distortions.presets import PRESETS
from featdistill.evaluation import metrics
from featdistill.images.equalization import read_settings
from featdistill.inference.scoring import score
from featdistill.models.expert import Expert
from featdistill.training.recipe import Recipe


def score_holdout(
    expert: Expert, holdout: pd.DataFrame, recipe: Recipe, accelerator: Accelerator
) -> dict[str, Any]:
    """Return `images`, `clean_auc` and `robust_auc` of an expert; each process scores a share of the rows.

    If no row is distorted, the rows are scored a second time with the official distortions, drawn from (0,
    name).
    """
    is_distorted = (holdout["is_distorted"] == 1).fillna(False).to_numpy(dtype=bool)
    parts = [(holdout[~is_distorted], None), (holdout[is_distorted], None)]
    if not is_distorted.any():
        parts[1] = (holdout, PRESETS["official"])
    expert.eval()
    auc = []
    for rows, policy in parts:
        rows = rows.reset_index(drop=True)
        batches = range(-(-len(rows) // recipe.score_batch_size))
        scored = [
            (row, float(logit))
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
            )
            for row, logit in zip(batch.rows, batch.logits[0], strict=True)
        ]
        scored = sorted(gather_object(scored))
        label = rows["label"].to_numpy(dtype=np.int64)[[row for row, _ in scored]]
        auc.append(metrics.roc_auc(label, np.array([logit for _, logit in scored])))
    return {"images": len(holdout), "clean_auc": auc[0], "robust_auc": auc[1]}
