"""Do the experts of an ensemble see the same things? Rank correlations, and who is right where one errs.

Experts of one opinion are one expert: an ensemble gains by members that are good and fail on different
images.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from featdistill.evaluation.bootstrap import Resampling, interval, model_draws
from featdistill.evaluation.metrics import THRESHOLD, checked, parts_of, roc_auc


def rank_correlations(scores: Sequence[np.ndarray]) -> list[list[float | None]]:
    """Return Spearman's correlation of each two of M experts, ties by their mean rank.

    Args:
        scores: M times (N,).

    Returns:
        (M, M); None with an expert that gives all images one score, or where there are fewer than 2 images.
    """
    ranks = np.stack([pd.Series(score).rank().to_numpy() for score in scores])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    norm = np.sqrt((centred**2).sum(axis=1))
    size = np.outer(norm, norm)
    inner = centred @ centred.T
    return [
        [
            float(np.clip(inner[row, column] / size[row, column], -1, 1)) if size[row, column] else None
            for column in range(len(ranks))
        ]
        for row in range(len(ranks))
    ]


def rescues(label: np.ndarray, scores: Sequence[np.ndarray]) -> tuple[list[int], list[list[float | None]]]:
    """Return who is right where another errs, at `THRESHOLD`.

    Args:
        label: (N,) 0 or 1.
        scores: M times (N,) P(AI-generated).

    Returns:
        How many mistakes each makes; and for each its row: the share of its mistakes that each other gets
        right, None of its own and where it makes none.
    """
    wrong = np.stack([(score > THRESHOLD) != (np.asarray(label) == 1) for score in scores])
    counts = wrong.sum(axis=1)
    both = wrong.astype(np.int64) @ wrong.T.astype(np.int64)
    shares = [
        [
            None if one == other or not counts[one] else float((counts[one] - both[one, other]) / counts[one])
            for other in range(len(wrong))
        ]
        for one in range(len(wrong))
    ]
    return counts.tolist(), shares


def per_expert(
    label: np.ndarray,
    score: np.ndarray,
    is_distorted: np.ndarray,
    experts: dict[str, np.ndarray],
    resampling: Resampling | None = None,
) -> dict[str, dict]:
    """Set each expert's clean and robust AUC against their mean and the ensemble's.

    Returns:
        `experts`: name -> `clean_auc`, `robust_auc`, and with `resampling` `intervals` of the two; `ensemble`
        (of `score`): the same; `mean` over the experts: the two AUCs.
    """
    parts = parts_of(is_distorted, len(label))
    parts.pop("auc")
    label = np.asarray(label)
    everyone = {"ensemble": score, **{f"expert {name}": values for name, values in experts.items()}}
    scores = np.stack([checked(label, values)[1] for values in everyone.values()])
    found: dict[str, dict] = {name: {} for name in everyone}
    drawn = {}
    for key, rows in parts.items():
        own = scores[:, rows]
        for result, values in zip(found.values(), own, strict=True):
            result[key] = roc_auc(label[rows], values)
        if resampling is not None:
            drawn[key] = model_draws(label[rows], own, resampling)
    for place, result in enumerate(found.values()):
        if drawn:
            result["intervals"] = {key: list(interval(values[place])) for key, values in drawn.items()}
    alone = {name: found[f"expert {name}"] for name in experts}
    columns = {key: [result[key] for result in alone.values()] for key in parts}
    mean = {
        key: float(np.mean(values)) if values and None not in values else None
        for key, values in columns.items()
    }
    return {"experts": alone, "mean": mean, "ensemble": found["ensemble"]}
