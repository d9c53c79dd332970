"""Calibration against values counted by hand."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from featdistill.evaluation import calibration


def test_bins_hold_what_lies_between_their_edges():
    label = np.array([0, 1, 1, 0, 1])
    score = np.array([0.0, 0.2, 0.39, 0.4, 1.0])
    bins = calibration.reliability(label, score, bins=5)
    assert [own["n"] for own in bins] == [1, 2, 1, 0, 1]
    assert [own["low"] for own in bins] == [0, 0.2, 0.4, 0.6, 0.8] and bins[-1]["high"] == 1
    assert bins[1]["mean_score"] == pytest.approx(0.295) and bins[1]["ai_share"] == 1
    assert bins[3]["mean_score"] is bins[3]["ai_share"] is None
    gaps = [1 * 0.0, 2 * 0.705, 1 * 0.4, 1 * 0.0]
    assert calibration.expected_error(bins) == pytest.approx(sum(gaps) / 5)


def test_scores_that_mean_what_they_say_have_no_error():
    score = np.repeat(np.arange(10) / 10, 10)
    label = np.tile(np.arange(10), 10) < 10 * score
    bins = calibration.reliability(label, score, bins=10)
    assert calibration.expected_error(bins) == pytest.approx(0, abs=1e-12)
    assert calibration.expected_error(calibration.reliability(~label, score, bins=10)) > 0.4


def test_the_brier_score_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    label, score = rng.integers(0, 2, 200), rng.random(200)
    assert calibration.brier(label, score) == pytest.approx(brier_score_loss(label, score), abs=1e-12)


def test_no_images_have_no_error_and_logits_are_refused():
    empty = calibration.reliability([], [])
    assert len(empty) == calibration.BINS and calibration.expected_error(empty) is None
    assert calibration.brier([], []) is None
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        calibration.reliability([1], [1.5])
