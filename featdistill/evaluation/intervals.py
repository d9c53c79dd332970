"""95 % confidence intervals of ROC AUCs and of their differences, by DeLong's method.

DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
characteristic curves" (Biometrics 44, 1988), with the midranks of Sun and Xu (IEEE Signal Processing Letters
21, 2014). AUCs over the same images are correlated; their covariance makes intervals of differences paired.
"""

import math

import numpy as np
from scipy.special import expit, logit, ndtri
from scipy.stats import rankdata

from featdistill.evaluation.metrics import roc_auc

METHOD = {"method": "DeLong", "confidence": 0.95}
_Z = float(ndtri((1 + METHOD["confidence"]) / 2))

Bounds = tuple[float | None, float | None]


def auc_covariance(label: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the covariance of the AUCs of M models over the same images.

    Args:
        label: (N,) 0 or 1.
        scores: (M, N), finite.

    Returns:
        (M, M) float64; all NaN where a class has fewer than two images.
    """
    label, scores = np.asarray(label), np.asarray(scores, dtype=np.float64)
    if min((label == 0).sum(), (label == 1).sum()) < 2:
        return np.full((len(scores), len(scores)), np.nan)
    above_ai, above_real = placements(label, scores)
    return np.atleast_2d(np.cov(above_ai) / above_ai.shape[1] + np.cov(above_real) / above_real.shape[1])


def placements(label: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each image the share of the other class with a lower score, ties counted half.

    Args:
        label, scores: as for `auc_covariance`; both classes have images.

    Returns:
        (M, real images), (M, AI-generated images); the mean of the second is the AUC.
    """
    real, ai = scores[:, label == 0], scores[:, label == 1]
    count = real.shape[1]
    ranks = rankdata(np.concatenate([real, ai], axis=1), axis=1)
    above_ai = (ranks[:, :count] - rankdata(real, axis=1)) / ai.shape[1]
    return above_ai, (ranks[:, count:] - rankdata(ai, axis=1)) / count


def auc_bounds(auc: float | None, variance: float) -> Bounds:
    """Return the interval of an AUC, or of a mean of AUCs; None twice where the variance is NaN.

    It is symmetric on the logit scale. So it stays within [0, 1], and near 1 it covers the true value more
    often than one that is symmetric around the AUC.
    """
    if auc is None or math.isnan(variance):
        return None, None
    if not 0 < auc < 1:
        return auc, auc
    margin = _Z * math.sqrt(max(variance, 0.0)) / (auc * (1 - auc))
    return float(expit(logit(auc) - margin)), float(expit(logit(auc) + margin))


def difference_bounds(difference: float | None, variance: float) -> Bounds:
    """Return the interval of a difference of two AUCs; None twice where the variance is NaN."""
    if difference is None or math.isnan(variance):
        return None, None
    margin = _Z * math.sqrt(max(variance, 0.0))
    return max(difference - margin, -1.0), min(difference + margin, 1.0)


def auc_interval(label: np.ndarray, score: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Return the AUC of (N,) scores and its interval, None where a class has fewer than two images."""
    auc = roc_auc(label, score)
    return auc, *auc_bounds(auc, auc_covariance(label, np.asarray(score)[None])[0, 0])
