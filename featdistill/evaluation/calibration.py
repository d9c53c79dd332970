"""Do scores mean what they say? Brier score, expected calibration error, bins of a reliability diagram.

The challenge ranks by AUC, to which calibration is nothing; a person who reads "0.9" cares. Everywhere:
`label` is (N,) 0 real, 1 AI-generated; `score` is (N,) P(AI-generated) in [0, 1].
"""

import numpy as np

# Equal widths, as in Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), section 2.
BINS = 15


def brier(label: np.ndarray, score: np.ndarray) -> float | None:
    """Return the mean squared difference of score and label, 0 best; None where there is no image."""
    return float(np.mean((np.asarray(score) - np.asarray(label)) ** 2)) if len(label) else None


def reliability(label: np.ndarray, score: np.ndarray, bins: int = BINS) -> list[dict]:
    """Return the bins of a reliability diagram.

    Returns:
        For each of `bins` intervals of equal width: `low`, `high` (in the last one a score may equal it),
        `n` images, and over them `mean_score` and `ai_share`, None where the bin is empty.

    Raises:
        ValueError: a score lies outside [0, 1].
    """
    label, score = np.asarray(label), np.asarray(score, dtype=np.float64)
    if not ((score >= 0) & (score <= 1)).all():
        raise ValueError("calibration takes scores in [0, 1]")
    edges = np.arange(bins + 1) / bins
    place = np.minimum(np.searchsorted(edges, score, side="right") - 1, bins - 1)
    images = np.bincount(place, minlength=bins)
    total, ai = (np.bincount(place, weights, bins) for weights in (score, label))
    return [
        {
            "low": float(edges[own]),
            "high": float(edges[own + 1]),
            "n": int(images[own]),
            "mean_score": float(total[own] / images[own]) if images[own] else None,
            "ai_share": float(ai[own] / images[own]) if images[own] else None,
        }
        for own in range(bins)
    ]


def expected_error(bins: list[dict]) -> float | None:
    """Return the expected calibration error: the mean of |mean score - share of AI| over all images' bins.

    This is the one of P(AI-generated) itself, not of the confidence in the class that was chosen.
    """
    images = sum(own["n"] for own in bins)
    gaps = [own["n"] * abs(own["mean_score"] - own["ai_share"]) for own in bins if own["n"]]
    return float(sum(gaps) / images) if images else None
