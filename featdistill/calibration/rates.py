"""What verdicts and probabilities became on labeled images."""

import numpy as np
from sklearn.metrics import log_loss

from featdistill.calibration.calibrator import AI, REAL
from featdistill.calibration.conformal import rate_with_interval
from featdistill.evaluation.metrics import expected_calibration_error, reliability


def verdict_rates(label: np.ndarray, verdicts: np.ndarray) -> dict[str, dict]:
    """Return `fpr`, `fnr` and `unsure` of (N,) labels and verdicts, each as of `rate_with_interval`."""
    real, ai = verdicts[label == 0], verdicts[label == 1]
    unsure = len(verdicts) - int(np.isin(verdicts, (AI, REAL)).sum())
    return {
        "fpr": rate_with_interval(int((real == AI).sum()), len(real)),
        "fnr": rate_with_interval(int((ai == REAL).sum()), len(ai)),
        "unsure": rate_with_interval(unsure, len(verdicts)),
    }


def calibration_error(label: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """Return `log_loss` and `ece`, the expected calibration error, of (N,) probabilities."""
    ece = expected_calibration_error(reliability(label, probability))
    return {"log_loss": float(log_loss(label, probability, labels=[0, 1])), "ece": ece}
