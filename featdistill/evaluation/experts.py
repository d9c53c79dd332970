"""The experts of an ensemble: AUCs, rank correlations, and how many of its errors another one corrects.

An ensemble gains from members that are good and fail on different images.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from featdistill.evaluation.intervals import auc_bounds, auc_covariance
from featdistill.evaluation.metrics import THRESHOLD, checked, parts_of, roc_auc
from featdistill.evaluation.stratified import next_to


def rank_correlations(scores: Sequence[np.ndarray]) -> list[list[float | None]]:
    """Return Spearman's correlation of each pair of M experts, with mean ranks for ties.

    Args:
        scores: M times (N,).

    Returns:
        (M, M); None for an expert whose scores are all equal, or where there are fewer than two images.
    """
    correlations = pd.DataFrame(dict(enumerate(scores))).corr(method="spearman").astype(object)
    return correlations.where(correlations.notna(), None).to_numpy().tolist()


def corrected_errors(
    label: np.ndarray, scores: Sequence[np.ndarray]
) -> tuple[list[int], list[list[float | None]]]:
    """Return how many errors each expert makes, and the share of them that each other one gets right.

    Args:
        label: (N,) 0 or 1.
        scores: M times (N,) P(AI-generated); errors are those at `THRESHOLD`.

    Returns:
        M counts; (M, M) shares, None on the diagonal and for an expert without errors.
    """
    wrong = np.stack([(score > THRESHOLD) != (np.asarray(label) == 1) for score in scores])
    counts = wrong.sum(axis=1)
    both = wrong.astype(np.int64) @ wrong.T.astype(np.int64)
    shares = [
        [
            None if one == other or not count else float((count - both[one, other]) / count)
            for other in range(len(wrong))
        ]
        for one, count in enumerate(counts)
    ]
    return counts.tolist(), shares


def per_expert(
    label: np.ndarray,
    score: np.ndarray,
    is_distorted: np.ndarray,
    experts: dict[str, np.ndarray],
    control: np.ndarray | None = None,
) -> dict[str, dict]:
    """Return the clean and the robust AUC of each expert, of the ensemble, and their mean over the experts.

    Args:
        score: (N,) of the ensemble.
        experts: name -> (N,).
        control: (N,) scores to set next to all AUCs; see `stratified.next_to`.

    Returns:
        `experts`: name -> `clean_auc`, `robust_auc`, `intervals` of the two and, with a control, `content` of
        the two; `ensemble`: the same; `mean`: the two AUCs.
    """
    label, parts = np.asarray(label), parts_of(is_distorted, len(label))
    scores = np.stack([checked(label, values)[1] for values in (score, *experts.values())])
    rows: list[dict] = [{"clean_auc": None, "robust_auc": None, "intervals": {}} for _ in scores]
    mean = {}
    for metric in ("clean_auc", "robust_auc"):
        labels, part = label[parts[metric]], scores[:, parts[metric]]
        for row, values, variance in zip(rows, part, np.diag(auc_covariance(labels, part)), strict=True):
            row[metric] = roc_auc(labels, values)
            row["intervals"][metric] = list(auc_bounds(row[metric], variance))
            if control is not None:
                row.setdefault("content", {})[metric] = next_to(labels, values, control[parts[metric]])
        aucs = [row[metric] for row in rows[1:]]
        mean[metric] = float(np.mean(aucs)) if aucs and None not in aucs else None
    return {"experts": dict(zip(experts, rows[1:], strict=True)), "mean": mean, "ensemble": rows[0]}
