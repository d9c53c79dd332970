"""AUCs over the pairs within strata, with 95 % intervals: images are only compared with images like them.

An AUC is the share of pairs, one AI-generated and one real image, that are ranked correctly. If the images of
a pair are alike in a column of the manifest, such as how far they were reduced, that column cannot have told
them apart. Each stratum counts by its number of pairs.

The strata are independent samples, so the variance is the sum of their DeLong variances, each times the
square of its share of the pairs. A class with a single image in a stratum is taken to vary as it does in the
other strata. Where too many strata are like that, as with matched pairs, the variance is that of the strata's
AUCs.
"""

import numpy as np
import pandas as pd

from featdistill.evaluation.intervals import auc_bounds, auc_covariance, difference_bounds
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
        M AUCs, None without pairs; (M, M) float64, NaN where a class has fewer than two images.
    """
    if stratum is None:
        return [roc_auc(label, score) for score in scores], auc_covariance(label, scores)
    values = pd.DataFrame(np.asarray(scores, dtype=np.float64).T)
    rows, strata, counts = _comparable(np.asarray(label), stratum)
    if not len(rows):
        return [None] * values.shape[1], np.full((values.shape[1],) * 2, np.nan)
    values, label = values.iloc[rows], np.asarray(label)[rows]
    weights = counts.prod(axis=1) / counts.prod(axis=1).sum()
    # For each image, the share of the other class in its stratum with a lower score, ties counted half.
    cell = 2 * strata + label
    lower = values.groupby(strata).rank() - values.groupby(cell).rank()
    lower = (lower.to_numpy() / counts[strata, 1 - label][:, None])[np.argsort(cell, kind="stable")]
    ends = np.cumsum(counts)
    means = np.add.reduceat(lower, np.r_[0, ends[:-1]], axis=0) / counts.reshape(-1, 1)
    of_strata = means[1::2]
    value = weights @ of_strata
    apart = lower - np.repeat(means, counts.ravel(), axis=0)
    covariance = sum(
        _variance_of_class(
            apart[np.repeat(np.arange(counts.size), counts.ravel()) % 2 == side], counts[:, side], weights
        )
        for side in (0, 1)
    )
    if np.isnan(covariance).any() and len(weights) > 1:
        apart = weights[:, None] * (of_strata - value)
        covariance = apart.T @ apart * len(weights) / (len(weights) - 1)
    return value.tolist(), covariance


def count_pairs(label: np.ndarray, stratum: np.ndarray) -> dict[str, int]:
    """Return the numbers of `pairs` within strata, and of the `strata` that have any, with their `images`."""
    rows, _, counts = _comparable(np.asarray(label), stratum)
    return {"images": len(rows), "pairs": int(counts.prod(axis=1).sum()), "strata": len(counts)}


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


def _comparable(label: np.ndarray, stratum: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what pairs are made of.

    Returns:
        The numbers of the images in strata that have both classes; for each of them the number of its
        stratum, from 0; (strata, 2), the numbers of real and AI-generated images of each stratum.
    """
    known = np.flatnonzero(stratum >= 0)
    _, number = np.unique(stratum[known], return_inverse=True)
    counts = np.bincount(2 * number + label[known], minlength=2 * (number.max(initial=-1) + 1)).reshape(-1, 2)
    has_both = counts.all(axis=1)
    rows = has_both[number]
    return known[rows], (np.cumsum(has_both) - 1)[number[rows]], counts[has_both]


def _variance_of_class(apart: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return one class's share of the covariance, (M, M); NaN where single images are too many to know it.

    Args:
        apart: (N, M), the shares of the other class below each image of this class, minus their mean in the
            stratum; stratum by stratum.
        counts, weights: of the strata, the numbers of images of this class and the shares of the pairs.
    """
    is_single, freedom = counts == 1, int((counts - 1).sum())
    if is_single.sum() > freedom:
        return np.full((apart.shape[1],) * 2, np.nan)
    factors = np.where(is_single, 0.0, weights**2 / (counts * np.maximum(counts - 1, 1)))
    if is_single.any():
        factors += (weights[is_single] ** 2).sum() / freedom
    return apart.T @ (apart * np.repeat(factors, counts)[:, None])
