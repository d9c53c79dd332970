"""Conformal thresholds against theory: the promise, its distribution, and the number of images needed."""

import numpy as np
import pytest
from scipy.stats import beta, kstest

from featdistill.calibration.conformal import (
    expected_rate,
    images_needed,
    lower_threshold,
    rate_quantile,
    rate_with_interval,
    upper_threshold,
)


@pytest.mark.parametrize(
    ("rate", "needed"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.001, 999), (0.3, 3), (0.5, 1)]
)
def test_so_many_images_are_needed_and_one_less_is_refused(rate, needed):
    assert images_needed(rate) == needed
    scores = np.arange(needed, dtype=float)
    # With the fewest images, nothing may lie above the threshold.
    assert upper_threshold(scores, rate) == scores.max() and lower_threshold(scores, rate) == 0
    with pytest.raises(ValueError, match=f"needs {needed} images, not {needed - 1}"):
        upper_threshold(scores[1:], rate)


def test_a_threshold_is_the_score_at_its_place():
    scores = np.random.default_rng(0).permutation(100).astype(float)
    # floor(0.05 x 101) = 5: the fifth highest of 0 to 99.
    assert upper_threshold(scores, 0.05) == 95 and lower_threshold(scores, 0.05) == 4
    assert expected_rate(100, 0.05) == 5 / 101


@pytest.mark.parametrize(("images", "rate"), [(19, 0.05), (250, 0.05), (300, 0.01), (1000, 0.1)])
def test_rates_of_1000_calibrations_are_at_most_promised_on_average_and_have_the_beta_distribution(
    images, rate
):
    rng = np.random.default_rng(images)
    # Uniform scores: the share of all images above a threshold t is 1 - t exactly.
    found = np.array([1 - upper_threshold(rng.random(images), rate) for _ in range(1000)])
    place = np.floor(rate * (images + 1) + 1e-9)
    law = beta(place, images + 1 - place)
    assert expected_rate(images, rate) == law.mean() <= rate
    assert abs(found.mean() - law.mean()) < 4 * law.std() / np.sqrt(1000)
    assert kstest(found, law.cdf).pvalue > 0.001
    assert rate_quantile(images, rate, 0.95) == law.ppf(0.95)
    assert abs((found < rate_quantile(images, rate, 0.95)).mean() - 0.95) < 0.03


def test_the_promise_holds_on_the_next_images_whatever_the_distribution():
    rng = np.random.default_rng(1)
    called = []
    for _ in range(1000):
        # Heavy tails, and ties.
        scores = np.round(rng.standard_t(2, 150), 1)
        called.append((scores[50:] > upper_threshold(scores[:50], 0.1)).mean())
    assert np.mean(called) <= 0.1


def test_an_interval_of_a_rate_is_exact():
    one = rate_with_interval(5, 100)
    assert (one["n"], one["hits"], one["rate"]) == (100, 5, 0.05)
    np.testing.assert_allclose([one["low"], one["high"]], [beta.ppf(0.025, 5, 96), beta.ppf(0.975, 6, 95)])
    assert rate_with_interval(0, 0)["rate"] is None
