"""AUCs over several views of the same images, or over several folds, with DeLong intervals.

Views of an image are not independent, and neither are two detectors on the same images. So an AUC comes with
what every image contributes to its deviation: contributions of the same image add up before they are squared.
For one view, this is DeLong's interval; see `featdistill.evaluation.intervals`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from featdistill.evaluation.intervals import auc_bounds, difference_bounds, placements


class MeanAuc(NamedTuple):
    """An AUC, or a mean of AUCs.

    Attributes:
        auc: None where no part has both classes.
        deviation: (N,) float64, what each image contributes; the sum of squares is the variance. NaN where a
            part has a class with a single image.
    """

    auc: float | None
    deviation: np.ndarray

    def describe(self) -> dict[str, float | None]:
        """Return `auc`, `low` and `high`, the 95 % interval."""
        low, high = auc_bounds(self.auc, float(np.square(self.deviation).sum()))
        return {"auc": self.auc, "low": low, "high": high}

    def exceeds(self, other: "MeanAuc") -> dict[str, float | None]:
        """Return the `difference` to another AUC over the same images, and its interval `low` and `high`."""
        if self.auc is None or other.auc is None:
            return dict.fromkeys(("difference", "low", "high"))
        difference = self.auc - other.auc
        variance = float(np.square(self.deviation - other.deviation).sum())
        low, high = difference_bounds(difference, variance)
        return {"difference": difference, "low": low, "high": high}


def mean_auc(label: np.ndarray, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> MeanAuc:
    """Return the mean of the AUCs of several parts; parts without both classes are left out.

    Args:
        label: (N,) 0 or 1.
        parts: (N,) scores, and (N,) bool which images are in the part.
    """
    label, aucs, deviations = np.asarray(label), [], []
    for score, inside in parts:
        real, ai = inside & (label == 0), inside & (label == 1)
        if not (real.any() and ai.any()):
            continue
        above_ai, above_real = placements(label[inside], score[inside][None])
        auc = float(above_real.mean())
        deviation = np.zeros(len(label))
        # A real image contributes the share of AI-generated ones above it.
        for rows, shares in ((real, above_ai[0]), (ai, above_real[0])):
            count = len(shares)
            deviation[rows] = (shares - shares.mean()) / np.sqrt(count * (count - 1)) if count > 1 else np.nan
        deviation[real] *= -1
        aucs.append(auc)
        deviations.append(deviation)
    if not aucs:
        return MeanAuc(None, np.full(len(label), np.nan))
    return MeanAuc(float(np.mean(aucs)), np.mean(deviations, axis=0))


def view_figures(
    label: np.ndarray,
    scores: np.ndarray,
    is_distorted: np.ndarray,
    inside: np.ndarray | None = None,
    control: np.ndarray | None = None,
    fold: np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the AUCs of clean and of distorted views.

    Args:
        label: (N,) 0 or 1.
        scores: (N, W) of W views.
        is_distorted: (N, W), 0 clean, 1 distorted, -1 neither: left out.
        inside: (N,) bool, the images; None: all.
        control: (N,) scores of the content control.
        fold: (N,); the mean of the AUCs within the folds is added.

    Returns:
        `clean` and `robust`, each with `auc`, `low`, `high`; with a control, `control` (the same of it) and
        `exceeds` (`difference`, `low`, `high`); with folds, `within_folds` (`auc`, `low`, `high`). A robust
        AUC is the mean of those of the distorted views.
    """
    inside = np.ones(len(label), bool) if inside is None else inside
    result = {}
    for name, kind in (("clean", 0), ("robust", 1)):
        masks = [inside & (column == kind) for column in is_distorted.T]
        found = mean_auc(label, zip(scores.T, masks, strict=True))
        result[name] = found.describe()
        if control is not None:
            against = mean_auc(label, [(control, mask) for mask in masks])
            result[name] |= {"control": against.describe(), "exceeds": found.exceeds(against)}
        if fold is not None:
            parts = [
                (score, mask & (fold == part))
                for part in np.unique(fold)
                for score, mask in zip(scores.T, masks, strict=True)
            ]
            result[name]["within_folds"] = mean_auc(label, parts).describe()
    return result
