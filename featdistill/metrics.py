"""The challenge's metrics: ROC AUC over clean and over distorted images, and where it is won and lost.

Everywhere: `label` is (N,) 0 real, 1 AI-generated; `score` is (N,), finite, larger is more AI-generated;
`is_distorted` is (N,) 0 clean, 1 distorted, -1 not known. A metric that the images do not define, such as an
AUC over one class, is None, never 0.5, 0 or NaN.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

# A score above it says AI-generated. The challenge ranks by AUC and sets none: the middle of [0, 1].
THRESHOLD = 0.5


def roc_auc(label: np.ndarray, score: np.ndarray) -> float | None:
    """Return the area under the ROC curve, ties counted half; None where one of the two classes is missing.

    Raises:
        ValueError: a label is not 0 or 1, a score is not finite, or the lengths differ.
    """
    label, score = _checked(label, score)
    return None if _one_class(label) else float(roc_auc_score(label, score))


def headline(label: np.ndarray, score: np.ndarray, is_distorted: np.ndarray) -> dict:
    """Return the metrics of one split.

    Returns:
        Counts: `images`, `real`, `ai`, `clean`, `distorted`, and `ai_share`. The challenge's two metrics:
        `clean_auc` over the undistorted, `robust_auc` over the distorted images. Over all images: `auc`,
        `average_precision`, and at `THRESHOLD` `accuracy`, `real_accuracy`, `ai_accuracy`. `undefined`: the
        name of each metric that is None -> the reason.

    Raises:
        ValueError: as `roc_auc`, or an `is_distorted` is not 0, 1 or -1.
    """
    label, score = _checked(label, score)
    is_distorted = _states(is_distorted, len(label))
    real, ai = label == 0, label == 1
    clean, distorted = is_distorted == 0, is_distorted == 1
    result = {
        "images": len(label),
        "real": int(real.sum()),
        "ai": int(ai.sum()),
        "clean": int(clean.sum()),
        "distorted": int(distorted.sum()),
        "ai_share": float(ai.mean()) if len(label) else None,
        "clean_auc": roc_auc(label[clean], score[clean]),
        "robust_auc": roc_auc(label[distorted], score[distorted]),
        "auc": roc_auc(label, score),
        "average_precision": None if _one_class(label) else float(average_precision_score(label, score)),
    }
    reasons = {
        "clean_auc": _why(label[clean], "clean images"),
        "robust_auc": _why(label[distorted], "distorted images"),
    }
    if len(label) and (is_distorted == -1).all():
        reasons = dict.fromkeys(reasons, "the labels do not say which images are distorted")
    is_probability = bool(((score >= 0) & (score <= 1)).all())
    right = (score > THRESHOLD) == ai
    for name, rows in (("accuracy", real | ai), ("real_accuracy", real), ("ai_accuracy", ai)):
        result[name] = float(right[rows].mean()) if is_probability and rows.any() else None
        reasons[name] = (
            f"no {name.partition('_')[0]} images" if is_probability else "scores lie outside [0, 1]"
        )
    undefined = {name: reasons.get(name, _why(label, "images")) for name in result if result[name] is None}
    return {**result, "undefined": undefined}


def per_generator(label: np.ndarray, score: np.ndarray, generator: Sequence[str]) -> dict[str, dict]:
    """Return for each generator the AUC of its images against all real ones, and `n`, how many it made.

    Args:
        generator: N names; empty where the image is real or its generator is not known.
    """
    label, score = _checked(label, score)
    generator = _texts(generator, len(label))
    real, ai = label == 0, label == 1
    result = {}
    for name in sorted(set(generator[ai].tolist()) - {""}):
        own = ai & (generator == name)
        rows = real | own
        result[name] = {"auc": roc_auc(label[rows], score[rows]), "n": int(own.sum())}
    return result


def per_distortion(label: np.ndarray, score: np.ndarray, chains: Sequence[Sequence[str]]) -> dict[str, dict]:
    """Return for each distortion the AUC over the images whose chain holds it, and their number `n`.

    Args:
        chains: for each of N images the names of its distortions; one that appears twice counts once.
    """
    label, score = _checked(label, score)
    if len(chains) != len(label):
        raise ValueError(f"{len(chains)} chains for {len(label)} labels")
    rows_of: dict[str, list[int]] = {}
    for row, chain in enumerate(chains):
        for name in set(chain):
            rows_of.setdefault(name, []).append(row)
    return {
        name: {"auc": roc_auc(label[rows], score[rows]), "n": len(rows)}
        for name, rows in sorted(rows_of.items())
    }


def per_chain_length(label: np.ndarray, score: np.ndarray, length: np.ndarray) -> dict[str, dict]:
    """Return for each number of distortions in a chain the AUC over its images and their number `n`.

    Args:
        length: (N,) number of distortions, 0 for clean images; negative where it is not known.
    """
    label, score = _checked(label, score)
    length = np.asarray(length)
    if length.shape != label.shape:
        raise ValueError(f"lengths of shape {length.shape} for {len(label)} labels")
    result = {}
    for value in np.unique(length[length >= 0]).tolist():
        rows = length == value
        result[str(value)] = {"auc": roc_auc(label[rows], score[rows]), "n": int(rows.sum())}
    return result


def per_expert(
    label: np.ndarray, score: np.ndarray, is_distorted: np.ndarray, experts: dict[str, np.ndarray]
) -> dict[str, dict]:
    """Set each expert's clean and robust AUC against their mean and the ensemble's.

    Returns:
        `experts`: name -> `clean_auc`, `robust_auc`; `mean` over the experts and `ensemble` (of `score`): the
        same two.
    """
    is_distorted = _states(is_distorted, len(label))
    clean, distorted = is_distorted == 0, is_distorted == 1
    label = np.asarray(label)

    def both(values: np.ndarray) -> dict[str, float | None]:
        values = np.asarray(values)
        return {
            "clean_auc": roc_auc(label[clean], values[clean]),
            "robust_auc": roc_auc(label[distorted], values[distorted]),
        }

    alone = {name: both(values) for name, values in experts.items()}
    columns = {key: [result[key] for result in alone.values()] for key in ("clean_auc", "robust_auc")}
    mean = {
        key: float(np.mean(values)) if values and None not in values else None
        for key, values in columns.items()
    }
    return {"experts": alone, "mean": mean, "ensemble": both(score)}


def _checked(label: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    label, score = np.asarray(label), np.asarray(score, dtype=np.float64)
    if label.ndim != 1 or label.shape != score.shape:
        raise ValueError(f"label has shape {label.shape}, score {score.shape}; both must be (N,)")
    if not np.isin(label, (0, 1)).all():
        raise ValueError("a label is neither 0 (real) nor 1 (AI-generated)")
    if not np.isfinite(score).all():
        raise ValueError("a score is not a finite number")
    return label.astype(np.int8), score


def _states(is_distorted: np.ndarray, rows: int) -> np.ndarray:
    is_distorted = np.asarray(is_distorted)
    if is_distorted.shape != (rows,):
        raise ValueError(f"is_distorted has shape {is_distorted.shape} for {rows} labels")
    if not np.isin(is_distorted, (0, 1, -1)).all():
        raise ValueError("is_distorted must be 0 (clean), 1 (distorted) or -1 (not known)")
    return is_distorted.astype(np.int8)


def _texts(values: Sequence[str], rows: int) -> np.ndarray:
    texts = np.asarray(values, dtype=object)
    if texts.shape != (rows,):
        raise ValueError(f"{texts.shape} names for {rows} labels")
    return texts


def _one_class(label: np.ndarray) -> bool:
    return len(label) == 0 or label.min() == label.max()


def _why(label: np.ndarray, what: str) -> str:
    """Return the reason why an AUC over these labels is not defined."""
    if len(label) == 0:
        return f"no {what}"
    return f"all {what} are {'AI-generated' if label[0] else 'real'}"
