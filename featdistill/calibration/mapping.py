"""From logits to calibrated probabilities: Platt's sigmoid or an isotonic step function."""

import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from featdistill.calibration.calibrator import ISOTONIC, PLATT


def fit_platt(logits: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Return `slope` and `intercept` of a sigmoid over logits.

    The targets are those of Platt, "Probabilistic outputs for support vector machines" (1999), a little
    inside of 0 and 1, so that the slope is finite where the classes do not overlap.

    Args:
        logits: (N,).
        label: (N,) 0 or 1; both classes have images.
    """
    real, ai = (label == 0).sum(), (label == 1).sum()
    target = np.where(label == 1, (ai + 1) / (ai + 2), 1 / (real + 2))
    doubled = np.concatenate([logits, logits])[:, None]
    classes = np.repeat([1, 0], len(logits))
    # Two numbers are fitted to many rows: without a penalty.
    model = LogisticRegression(C=np.inf, solver="newton-cholesky")
    model.fit(doubled, classes, sample_weight=np.concatenate([target, 1 - target]))
    return {"slope": float(model.coef_[0, 0]), "intercept": float(model.intercept_[0])}


def fit_isotonic(logits: np.ndarray, label: np.ndarray) -> dict[str, list[float]]:
    """Return `logits` and `probabilities` between which it is linear.

    No probability is closer to 0 or 1 than N images can tell, 1 / (N + 2).
    """
    edge = 1 / (len(label) + 2)
    model = IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip").fit(logits, label)
    return {"logits": model.X_thresholds_.tolist(), "probabilities": model.y_thresholds_.tolist()}


FITS = {PLATT: fit_platt, ISOTONIC: fit_isotonic}
