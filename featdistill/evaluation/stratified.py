"""AUCs over the pairs within strata, with 95 % intervals: images are only compared with images like them.

An AUC is the share of pairs, one AI-generated and one real image, that are ranked correctly. If the images of
a pair are alike in a column of the manifest, such as how far they were reduced, that column cannot have told
them apart. Each stratum counts by its number of pairs.

The strata are independent samples, so the variance is the sum of their DeLong variances, each times the
square of its share of the pairs. The numbers of images of each class and stratum are taken as given.
"""

import numpy as np

from featdistill.evaluation.intervals import auc_bounds, auc_covariance, difference_bounds, placements
from featdistill.evaluation.metrics import roc_auc

Aucs = tuple[list[float | None], np.ndarray]


def aucs(label: np.ndarray, scores: np.ndarray, stratum: np.ndarray | None = None) -> Aucs:
    """Return the AUCs of M models over the same images, and their covariance.

    Args:
        label: (N,) 0 or 1.
        scores: (M, N), finite.
        stratum: (N,) number of each image's stratum, -1 for none: pairs are those within a stratum. None:
            all pairs.

    Returns:
        M AUCs, None without pairs; (M, M) float64, NaN where a class has fewer than two images, or two in no
        stratum.
    """
    if stratum is None:
        return [roc_auc(label, score) for score in scores], auc_covariance(label, scores)
    label, scores = np.asarray(label), np.asarray(scores, dtype=np.float64)
    parts = [placements(label[rows], scores[:, rows]) for rows in _comparable(label, stratum)]
    pairs = np.array([real.shape[1] * ai.shape[1] for real, ai in parts], dtype=np.float64)
    if not len(parts):
        return [None] * len(scores), np.full((len(scores), len(scores)), np.nan)
    weights = pairs / pairs.sum()
    values = sum(weight * ai.mean(axis=1) for weight, (_, ai) in zip(weights, parts, strict=True))
    covariance = sum(_variance_of_class([part[side] for part in parts], weights) for side in (0, 1))
    return values.tolist(), covariance


def count_pairs(label: np.ndarray, stratum: np.ndarray) -> dict[str, int]:
    """Return the numbers of `pairs` within strata, and of the `strata` that have any, with their `images`."""
    counts = [np.bincount(label[rows], minlength=2).tolist() for rows in _comparable(label, stratum)]
    pairs, images = sum(real * ai for real, ai in counts), sum(map(sum, counts))
    return {"images": images, "pairs": pairs, "strata": len(counts)}


def auc_row(label: np.ndarray, score: np.ndarray, stratum: np.ndarray | None = None) -> dict:
    """Return `auc`, `low` and `high` of (N,) scores; each None where it is not defined."""
    (auc,), covariance = aucs(label, np.asarray(score)[None], stratum)
    low, high = auc_bounds(auc, covariance[0, 0])
    return {"auc": auc, "low": low, "high": high}


def next_to(
    label: np.ndarray, score: np.ndarray, control: np.ndarray, stratum: np.ndarray | None = None
) -> dict:
    """Return what a control reaches on the same images, and what the AUC of the scores exceeds it by.

    Args:
        control: (N,) scores of the control, NaN for an image it does not have; that image is left out.

    Returns:
        `auc`, `low`, `high` of the control; `exceeds`, `exceeds_low`, `exceeds_high`: the AUC of `score`
        minus it, with the paired interval; `images` that both scored. None where not defined.
    """
    rows = np.isfinite(control)
    values, covariance = aucs(
        label[rows], np.stack([score[rows], control[rows]]), None if stratum is None else stratum[rows]
    )
    low, high = auc_bounds(values[1], covariance[1, 1])
    exceeds = None if values[1] is None else values[0] - values[1]
    bounds = difference_bounds(exceeds, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    result = {"auc": values[1], "low": low, "high": high}
    result |= {"exceeds": exceeds, "exceeds_low": bounds[0], "exceeds_high": bounds[1]}
    return {**result, "images": int(rows.sum())}


def _comparable(label: np.ndarray, stratum: np.ndarray) -> list[np.ndarray]:
    """Return the numbers of the images of each stratum that has both classes."""
    order = np.argsort(stratum, kind="stable")
    order = order[np.searchsorted(stratum[order], 0) :]
    strata = np.split(order, np.flatnonzero(np.diff(stratum[order])) + 1)
    return [rows for rows in strata if len(rows) and 0 < label[rows].sum() < len(rows)]


def _variance_of_class(parts: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Return one class's share of the covariance, (M, M).

    Args:
        parts: of each stratum (M, n), the shares of the other class's images below or above each image.
        weights: of the strata.
    """
    models = len(parts[0])
    counts = np.array([part.shape[1] for part in parts])
    own = [np.cov(part).reshape(models, models) if part.shape[1] > 1 else None for part in parts]
    # One image alone does not show how much images vary: those of the other strata do.
    pooled, freedom = np.zeros((models, models)), int((counts - 1).sum())
    for count, covariance in zip(counts, own, strict=True):
        pooled += 0 if covariance is None else (count - 1) * covariance
    pooled = pooled / freedom if freedom else np.full((models, models), np.nan)
    return sum(
        weight**2 * (pooled if covariance is None else covariance) / count
        for weight, covariance, count in zip(weights, own, counts, strict=True)
    )
