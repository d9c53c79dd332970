"""Intervals of AUCs against their definition, a bootstrap, and how often they contain the true value."""

import numpy as np
import pytest

from featdistill.evaluation.intervals import auc_bounds, auc_covariance, auc_interval, difference_bounds
from featdistill.evaluation.metrics import roc_auc


@pytest.mark.parametrize("levels", [7, 10**6])
def test_the_covariance_is_delong_s_counted_pair_by_pair(levels):
    rng = np.random.default_rng(1)
    label = rng.permutation(np.repeat([0, 1], [31, 23]))
    scores = rng.integers(0, levels, (3, 54)) + 2 * label
    real, ai = scores[:, label == 0], scores[:, label == 1]
    # (models, AI, real): 1 where the AI-generated image has the higher score, 1/2 for a tie.
    won = (ai[:, :, None] > real[:, None]) + 0.5 * (ai[:, :, None] == real[:, None])
    expected = np.cov(won.mean(axis=2)) / 23 + np.cov(won.mean(axis=1)) / 31
    np.testing.assert_allclose(auc_covariance(label, scores), expected, atol=1e-15)


def bootstrap(label, scores, draws=4000):
    """AUCs of each model, (models, draws), over images of each class drawn with replacement; without ties."""
    rng = np.random.default_rng(0)
    times = [1.0 * rng.multinomial(count, np.full(count, 1 / count), draws) for count in np.bincount(label)]
    real, ai = scores[:, label == 0], scores[:, label == 1]
    won = (ai[:, :, None] > real[:, None]).astype(float)
    return np.einsum("da,mar,dr->md", times[1], won, times[0], optimize=True) / won[0].size


def test_intervals_agree_with_a_bootstrap():
    rng = np.random.default_rng(0)
    label = np.arange(400) % 2
    first = rng.normal(1.2 * label, 1)
    scores = np.stack([first, first + rng.normal(0, 0.5, 400)])
    drawn = bootstrap(label, scores)
    _, low, high = auc_interval(label, first)
    assert (low, high) == pytest.approx(np.quantile(drawn[0], [0.025, 0.975]), abs=(high - low) / 10)
    covariance = auc_covariance(label, scores)
    assert covariance == pytest.approx(np.cov(drawn), rel=0.2)
    variance = np.array([1, -1]) @ covariance @ np.array([1, -1])
    difference = roc_auc(label, scores[0]) - roc_auc(label, scores[1])
    low, high = difference_bounds(difference, variance)
    expected = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
    assert (low, high) == pytest.approx(expected, abs=(high - low) / 10)
    # Paired: much narrower than either interval.
    assert high - low < np.subtract(*auc_interval(label, first)[:0:-1]) / 1.5


@pytest.mark.parametrize(("shift", "truth"), [(1.0, 0.7602499389065233), (2.5, 0.9614501337543953)])
def test_the_interval_contains_the_true_value_about_as_often_as_it_claims(shift, truth):
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1], 60)
    intervals = [auc_interval(label, rng.normal(shift * label, 1)) for _ in range(200)]
    assert 0.91 <= np.mean([low <= truth <= high for _, low, high in intervals]) <= 0.98


def test_the_order_of_the_images_changes_nothing():
    rng = np.random.default_rng(0)
    label, score, order = np.arange(200) % 2, rng.random(200), rng.permutation(200)
    assert auc_interval(label[order], score[order]) == pytest.approx(auc_interval(label, score), abs=1e-12)


def test_bounds_stay_within_their_range_and_equal_models_do_not_differ():
    label = np.array([0, 0, 0, 1, 1, 1])
    auc, low, high = auc_interval(label, np.array([1, 2, 4, 3, 5, 6]))
    assert 0 < low < auc < high < 1 and auc == pytest.approx(8 / 9)
    assert auc_interval(label, label) == (1, 1, 1)
    assert difference_bounds(0.9, 0.1) == (pytest.approx(0.9 - 1.959964 * 0.1**0.5, abs=1e-5), 1.0)
    covariance = auc_covariance(label, np.stack([label % 3] * 2))
    assert difference_bounds(0.0, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) == (0, 0)


def test_a_class_of_fewer_than_two_images_has_no_interval():
    for label in ([], [1, 1], [0], [0, 1, 1]):
        assert auc_interval(np.array(label), np.arange(len(label)) / 4)[1:] == (None, None)
    assert auc_bounds(None, 0.1) == difference_bounds(0.1, np.nan) == (None, None)
