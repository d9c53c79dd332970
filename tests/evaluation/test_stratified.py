"""AUCs within strata against a count over pairs, and how often their intervals contain the true value."""

import numpy as np
import pytest

from featdistill.evaluation.intervals import auc_bounds, auc_covariance, difference_bounds
from featdistill.evaluation.metrics import roc_auc
from featdistill.evaluation.stratified import auc_row, aucs, count_pairs, next_to


def counted(label, score, stratum):
    """Share of pairs within strata that are ranked correctly, and the number of pairs, one by one."""
    won = [
        (score[ai] > score[real]) + 0.5 * (score[ai] == score[real])
        for ai in np.flatnonzero(label == 1)
        for real in np.flatnonzero(label == 0)
        if stratum[ai] == stratum[real] >= 0
    ]
    return np.mean(won), len(won)


@pytest.mark.parametrize("levels", [6, 10**6])
@pytest.mark.parametrize("strata", [1, 3, 20])
def test_pairs_are_those_within_a_stratum(levels, strata):
    rng = np.random.default_rng(strata)
    label, stratum = rng.integers(0, 2, 90), rng.integers(-1, strata, 90)
    score = rng.integers(0, levels, 90).astype(float)
    auc, pairs = counted(label, score, stratum)
    assert auc_row(label, score, stratum)["auc"] == pytest.approx(auc, abs=1e-12)
    count = count_pairs(label, stratum)
    assert count["pairs"] == pairs
    both = [rows for rows in (stratum == own for own in range(strata)) if set(label[rows]) == {0, 1}]
    assert (count["strata"], count["images"]) == (len(both), sum(rows.sum() for rows in both))


def test_with_one_stratum_it_is_the_plain_auc():
    rng = np.random.default_rng(0)
    label = np.arange(61) % 2
    scores = rng.normal(label, 1, (3, 61))
    values, covariance = aucs(label, scores, np.zeros(61, int))
    assert values == pytest.approx([roc_auc(label, score) for score in scores], abs=1e-12)
    np.testing.assert_allclose(covariance, auc_covariance(label, scores), rtol=1e-12)
    plain, paired = auc_row(label, scores[0]), next_to(label, scores[0], scores[1])
    assert auc_row(label, scores[0], np.zeros(61, int)) == pytest.approx(plain, abs=1e-12)
    assert next_to(label, scores[0], scores[1], np.zeros(61, int)) == pytest.approx(paired, abs=1e-12)


def test_what_a_stratum_explains_is_gone_within_it():
    rng = np.random.default_rng(1)
    scale = rng.integers(0, 5, 4000)
    label = (rng.random(4000) < 0.1 + 0.2 * scale).astype(int)
    assert auc_row(label, scale.astype(float))["auc"] > 0.75
    # All pairs within a stratum tie.
    assert auc_row(label, scale.astype(float), scale) == {"auc": 0.5, "low": 0.5, "high": 0.5}
    row = auc_row(label, scale + rng.random(4000), scale)
    assert row["auc"] == pytest.approx(0.5, abs=0.03) and row["high"] - row["low"] < 0.06


SHARES = np.array([0.1, 0.3, 0.5, 0.7, 0.95])


def drawn(rng, shift, images, strata=5):
    """Two correlated scores whose AUC is the same within each stratum; the strata differ in their shares."""
    stratum = rng.integers(0, strata, images)
    label = (rng.random(images) < SHARES[stratum % 5]).astype(int)
    common = rng.normal(0, 0.7, images) + 2 * stratum
    scores = np.stack([common + shift * label + rng.normal(0, 0.7, images) for _ in range(2)])
    return label, scores, stratum


@pytest.mark.parametrize(
    ("shift", "truth", "images", "strata"),
    [(1.0, 0.7625, 200, 5), (2.0, 0.9234, 300, 5), (1.0, 0.7625, 120, 15)],
)
def test_the_interval_contains_the_true_value_about_as_often_as_it_claims(shift, truth, images, strata):
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(200):
        label, scores, stratum = drawn(rng, shift, images, strata)
        values, covariance = aucs(label, scores, stratum)
        low, high = auc_bounds(values[0], covariance[0, 0])
        variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        bounds = difference_bounds(values[0] - values[1], variance)
        inside.append((low <= truth <= high, bounds[0] <= 0 <= bounds[1]))
    assert np.mean(inside, axis=0) == pytest.approx(0.95, abs=0.04)


def test_a_single_image_of_a_class_counts_and_varies_like_the_others():
    label = np.array([0, 0, 1, 1, 1, 0, 0, 0, 1])
    stratum = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    score = np.array([1, 4, 3, 5, 6, 1, 2, 5, 3.0])
    row = auc_row(label, score, stratum)
    assert row["auc"] == pytest.approx((5 + 2) / 9) and row["low"] < row["auc"] < row["high"]
    one_pair = auc_row(np.array([0, 1]), np.array([1, 2.0]), np.array([0, 0]))
    assert one_pair == {"auc": 1.0, "low": None, "high": None}


def test_matched_pairs_have_the_interval_of_a_share():
    rng = np.random.default_rng(0)
    label, stratum = np.tile([0, 1], 400), np.repeat(np.arange(400), 2)
    score = rng.normal(label, 1) + 3 * stratum
    values, covariance = aucs(label, np.stack([score, -score]), stratum)
    won = score[1::2] > score[::2]
    assert values == pytest.approx([won.mean(), 1 - won.mean()])
    variance = won.var(ddof=1) / 400
    np.testing.assert_allclose(covariance, [[variance, -variance], [-variance, variance]], rtol=1e-9)


def test_without_pairs_nothing_is_defined():
    for label, stratum in (([0, 1], [0, 1]), ([0, 1, 1], [-1, -1, 0]), ([], [])):
        label, stratum = np.array(label, int), np.array(stratum, int)
        row = auc_row(label, np.arange(len(label)) / 4, stratum)
        assert row == {"auc": None, "low": None, "high": None}
        assert count_pairs(label, stratum) == {"images": 0, "pairs": 0, "strata": 0}


def test_a_control_is_measured_on_the_images_that_both_scored():
    rng = np.random.default_rng(0)
    label = np.arange(80) % 2
    score, control = rng.normal(label, 1), rng.normal(0.3 * label, 1)
    control[:20] = np.nan
    found = next_to(label, score, control)
    assert found["images"] == 60 and found["auc"] == roc_auc(label[20:], control[20:])
    assert found["exceeds"] == roc_auc(label[20:], score[20:]) - found["auc"]
    covariance = auc_covariance(label[20:], np.stack([score, control])[:, 20:])
    variance = np.array([1, -1]) @ covariance @ np.array([1, -1])
    bounds = difference_bounds(found["exceeds"], variance)
    assert (found["exceeds_low"], found["exceeds_high"]) == pytest.approx(bounds, abs=1e-12)
    assert next_to(label, score, np.full(80, np.nan)) == dict.fromkeys(found) | {"images": 0}
