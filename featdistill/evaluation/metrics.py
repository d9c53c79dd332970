"""The challenge's metrics, ROC AUC over the clean and over the distorted images, and further ones.

Everywhere `label` is (N,) 0 real, 1 AI-generated; `score` is (N,), finite, larger for AI-generated;
`is_distorted` is (N,) 0 clean, 1 distorted, -1 unknown. A metric that is not defined for the images, such as
an AUC over one class, is None, never 0.5, 0 or NaN.
"""

import math

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

# A higher score means AI-generated. The challenge ranks by AUC and sets no threshold: the middle of [0, 1].
THRESHOLD = 0.5
# False positive rates at which the true positive rate is reported.
RATES = {"tpr_at_fpr_1": 0.01, "tpr_at_fpr_5": 0.05}
AUCS = ("clean_auc", "robust_auc", "auc")
ACCURACIES = ("accuracy", "real_accuracy", "ai_accuracy")
# Of equal width, as in Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), section 2.
CALIBRATION_BINS = 15
_OF_PROBABILITIES = (*ACCURACIES, "brier", "ece")

Curve = tuple[np.ndarray, np.ndarray, np.ndarray]


def roc_auc(label: np.ndarray, score: np.ndarray) -> float | None:
    """Return the area under the ROC curve, ties counted half; None where a class is missing.

    Raises:
        ValueError: a label is not 0 or 1, a score is not finite, or the lengths differ.
    """
    label, score = checked(label, score)
    return None if one_class(label) else float(roc_auc_score(label, score))


def roc_curve(label: np.ndarray, score: np.ndarray) -> Curve | None:
    """Return false positive rates, true positive rates and thresholds; None where a class is missing.

    An image counts as AI-generated if its score is at least the threshold. Thresholds fall, from infinity.
    """
    label, score = checked(label, score)
    return None if one_class(label) else sklearn_roc_curve(label, score, drop_intermediate=False)


def tpr_at_fpr(curve: Curve, rate: float) -> float:
    """Return the largest true positive rate at a false positive rate of at most `rate`, not interpolated."""
    fpr, tpr, _ = curve
    return float(tpr[np.searchsorted(fpr, rate, side="right") - 1])


def equal_error_rate(curve: Curve) -> float:
    """Return the rate at which false positives and false negatives are equal, linear between two points."""
    fpr, tpr, _ = curve
    gap = fpr + tpr - 1
    after = int(np.argmax(gap >= 0))
    share = gap[after - 1] / (gap[after - 1] - gap[after])
    return float(fpr[after - 1] + share * (fpr[after] - fpr[after - 1]))


def best_threshold(label: np.ndarray, score: np.ndarray) -> float | None:
    """Return the threshold with the best mean of real and AI accuracy; None where a class is missing.

    It is halfway between two scores, and a higher score means AI-generated. Of equally good thresholds it is
    the highest.
    """
    curve = roc_curve(label, score)
    if curve is None:
        return None
    fpr, tpr, thresholds = curve
    best = int(np.argmax(tpr - fpr))
    if best == 0:
        return float(thresholds[1])
    flagged = float(thresholds[best])
    below = float(thresholds[best + 1]) if best + 1 < len(thresholds) else math.nextafter(flagged, -math.inf)
    middle = below + (flagged - below) / 2
    # There is nothing between adjacent floats.
    return middle if middle < flagged else below


def accuracies(label: np.ndarray, score: np.ndarray, threshold: float = THRESHOLD) -> dict[str, float | None]:
    """Return `ACCURACIES`: over all images and over each class; a score above the threshold means AI."""
    label, score = checked(label, score)
    right = (score > threshold) == (label == 1)
    rows = zip(ACCURACIES, (label >= 0, label == 0, label == 1), strict=True)
    return {name: float(right[of_class].mean()) if of_class.any() else None for name, of_class in rows}


def reliability(label: np.ndarray, score: np.ndarray, bins: int = CALIBRATION_BINS) -> list[dict]:
    """Return the bins of a reliability diagram.

    Args:
        score: P(AI-generated), in [0, 1].

    Returns:
        For each bin `low`, `high` (excluded, except in the last bin), the number `n` of images, and their
        `mean_score` and `ai_share`, None where the bin is empty.
    """
    label, score = checked(label, score)
    edges = np.arange(bins + 1) / bins
    position = np.clip(np.searchsorted(edges, score, side="right") - 1, 0, bins - 1)
    images = np.bincount(position, minlength=bins).tolist()
    totals, ai = (np.bincount(position, weights, bins) for weights in (score, label))
    return [
        {
            "low": float(edges[number]),
            "high": float(edges[number + 1]),
            "n": count,
            "mean_score": float(totals[number] / count) if count else None,
            "ai_share": float(ai[number] / count) if count else None,
        }
        for number, count in enumerate(images)
    ]


def expected_calibration_error(bins: list[dict]) -> float | None:
    """Return the mean over all images of |mean score - share of AI-generated images| in their bin.

    It is that of P(AI-generated), not of the confidence in the predicted class.
    """
    images = sum(one["n"] for one in bins)
    gaps = [one["n"] * abs(one["mean_score"] - one["ai_share"]) for one in bins if one["n"]]
    return float(sum(gaps) / images) if images else None


def headline(label: np.ndarray, score: np.ndarray, is_distorted: np.ndarray) -> dict:
    """Return the metrics of one split.

    Returns:
        Counts: `images`, `real`, `ai`, `clean`, `distorted`, and `ai_share`. The challenge's two metrics:
        `clean_auc` over the undistorted, `robust_auc` over the distorted images. Over all images: `auc`,
        `average_precision`, `RATES`, `eer`, `ACCURACIES` at `THRESHOLD`, and for probabilities `brier`, `ece`
        and the bins of `reliability`. `undefined`: the name of each metric that is None -> the reason.

    Raises:
        ValueError: as `roc_auc`, or an `is_distorted` is not 0, 1 or -1.
    """
    label, score = checked(label, score)
    parts = parts_of(is_distorted, len(label))
    clean, distorted = parts["clean_auc"], parts["robust_auc"]
    curve = roc_curve(label, score)
    result: dict = {
        "images": len(label),
        "real": int((label == 0).sum()),
        "ai": int((label == 1).sum()),
        "clean": int(clean.sum()),
        "distorted": int(distorted.sum()),
        "ai_share": float(label.mean()) if len(label) else None,
        **{name: roc_auc(label[rows], score[rows]) for name, rows in parts.items()},
        "average_precision": None if curve is None else float(average_precision_score(label, score)),
        **{name: None if curve is None else tpr_at_fpr(curve, rate) for name, rate in RATES.items()},
        "eer": None if curve is None else equal_error_rate(curve),
        **dict.fromkeys(_OF_PROBABILITIES),
    }
    bins: list[dict] = []
    is_probability = are_probabilities(score)
    if is_probability:
        bins = reliability(label, score)
        result |= accuracies(label, score)
        result["brier"] = float(np.mean((score - label) ** 2)) if len(label) else None
        result["ece"] = expected_calibration_error(bins)
    reasons = {
        "clean_auc": _why(label[clean], "clean images"),
        "robust_auc": _why(label[distorted], "distorted images"),
        "real_accuracy": "no real images",
        "ai_accuracy": "no ai images",
    }
    if len(label) and (np.asarray(is_distorted) == -1).all():
        reasons |= dict.fromkeys(
            ("clean_auc", "robust_auc"), "the labels do not say which images are distorted"
        )
    if not is_probability:
        reasons |= dict.fromkeys(_OF_PROBABILITIES, "scores are outside [0, 1]")
    undefined = {name: reasons.get(name, _why(label, "images")) for name in result if result[name] is None}
    return {**result, "reliability": bins, "undefined": undefined}


def parts_of(is_distorted: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """Return for each of `AUCS` which images it is taken over, (N,) bool.

    Raises:
        ValueError: `is_distorted` is not (rows,), or has values other than 0, 1 and -1.
    """
    is_distorted = np.asarray(is_distorted)
    if is_distorted.shape != (rows,):
        raise ValueError(f"is_distorted has shape {is_distorted.shape} for {rows} labels")
    if not np.isin(is_distorted, (0, 1, -1)).all():
        raise ValueError("is_distorted must be 0 (clean), 1 (distorted) or -1 (unknown)")
    return {"clean_auc": is_distorted == 0, "robust_auc": is_distorted == 1, "auc": np.ones(rows, dtype=bool)}


def checked(label: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) int8 labels and (N,) float64 scores.

    Raises:
        ValueError: a label is not 0 or 1, a score is not finite, or the lengths differ.
    """
    label, score = np.asarray(label), np.asarray(score, dtype=np.float64)
    if label.ndim != 1 or label.shape != score.shape:
        raise ValueError(f"label has shape {label.shape}, score {score.shape}; both must be (N,)")
    if not np.isin(label, (0, 1)).all():
        raise ValueError("a label is neither 0 (real) nor 1 (AI-generated)")
    if not np.isfinite(score).all():
        raise ValueError("a score is not a finite number")
    return label.astype(np.int8), score


def are_probabilities(score: np.ndarray) -> bool:
    """Return whether all scores are in [0, 1]."""
    return bool(((score >= 0) & (score <= 1)).all())


def one_class(label: np.ndarray) -> bool:
    """Return whether real or AI-generated images are missing."""
    return len(label) == 0 or label.min() == label.max()


def _why(label: np.ndarray, what: str) -> str:
    """Return the reason why an AUC over these labels is not defined."""
    if len(label) == 0:
        return f"no {what}"
    return f"all {what} are {'AI-generated' if label[0] else 'real'}"
