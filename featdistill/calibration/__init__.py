"""From a score to a verdict with a promise: calibrated probabilities and conformal thresholds.

`calibrator` is what is kept: a readable JSON file that turns logits into probabilities and verdicts.
"""

from featdistill.calibration.calibrator import AI, REAL, UNSURE, Calibrator

__all__ = ["AI", "REAL", "UNSURE", "Calibrator"]
