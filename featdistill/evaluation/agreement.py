"""Do the experts of an ensemble see the same things? Rank correlations, and who is right where one errs.

Experts of one opinion are one expert: an ensemble gains by members that are good and fail on different
images.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from featdistill.evaluation.metrics import THRESHOLD


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
