"""P(AI) and its logit."""

import numpy as np

from featdistill.records.logits import logits_of, probabilities


def test_logits_come_back_from_probabilities():
    logits = np.array([-700.0, -30, -1e-3, 0, 2, 15])
    np.testing.assert_allclose(logits_of(probabilities(logits)), logits, rtol=1e-9, atol=1e-15)
    extreme = logits_of(np.array([0.0, 1.0]))
    np.testing.assert_allclose(extreme, [-744.44, 36.74], atol=0.01)
