"""Between P(AI) and its logit, in float64: what is fused, calibrated and compared with thresholds."""

import numpy as np


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return P(AI) of logits in float64: in float32, all logits above 17 would tie at 1."""
    positive = np.exp(-np.abs(logits.astype(np.float64)))
    return np.where(logits >= 0, 1, positive) / (1 + positive)


def logits_of(probability: np.ndarray) -> np.ndarray:
    """Return the logits of P(AI), float64.

    The probabilities 0 and 1 count as their neighbors in float64, so that logits are in [-744.5, 36.8].
    """
    inside = np.clip(probability, np.nextafter(0.0, 1.0), np.nextafter(1.0, 0.0))
    return np.log(inside) - np.log1p(-inside)
