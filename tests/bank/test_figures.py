import numpy as np
import pytest

from featdistill.bank.figures import mean_auc, view_figures
from featdistill.evaluation.intervals import auc_bounds, auc_covariance, auc_interval, difference_bounds
from featdistill.evaluation.metrics import roc_auc


@pytest.fixture
def scored():
    """Return labels (40,) and scores (40, 3) of three related views."""
    rng = np.random.default_rng(1)
    y = np.tile([0, 0, 0, 1, 1], 8)
    common = rng.normal(size=40) + y
    return y, (common[:, None] + rng.normal(0, 0.7, (40, 3))).round(1)


def test_one_view_has_delongs_interval_and_views_their_covariance(scored):
    y, scores = scored
    everything = np.ones(40, bool)
    one = mean_auc(y, [(scores[:, 0], everything)])
    assert list(one.describe().values()) == pytest.approx(auc_interval(y, scores[:, 0]), abs=1e-12)
    covariance = auc_covariance(y, scores.T)
    three = mean_auc(y, [(score, everything) for score in scores.T])
    auc = np.mean([roc_auc(y, score) for score in scores.T])
    expected = [auc, *auc_bounds(auc, covariance.mean())]
    assert list(three.describe().values()) == pytest.approx(expected, abs=1e-12)
    other = mean_auc(y, [(scores[:, 1], everything)])
    difference = roc_auc(y, scores[:, 0]) - roc_auc(y, scores[:, 1])
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    expected = [difference, *difference_bounds(difference, variance)]
    assert list(one.exceeds(other).values()) == pytest.approx(expected, abs=1e-12)


def test_parts_of_one_class_are_left_out_and_single_images_give_no_interval(scored):
    y, scores = scored
    whole = (scores[:, 0], np.ones(40, bool))
    assert mean_auc(y, [whole, (scores[:, 1], y == 1)]).auc == mean_auc(y, [whole]).auc
    single = mean_auc(y, [(scores[:, 0], (y == 0) | (np.arange(40) == 3))]).describe()
    assert single["auc"] is not None and single["low"] is None
    nothing = mean_auc(y, [(scores[:, 0], y == 1)])
    assert nothing.describe() == {"auc": None, "low": None, "high": None}
    assert mean_auc(y, [whole]).exceeds(nothing) == {"difference": None, "low": None, "high": None}


def test_clean_and_robust_are_over_the_views_that_are_so(scored):
    y, scores = scored
    is_distorted = np.tile(np.array([0, 1, 1]), (40, 1))
    is_distorted[:10, 2] = -1
    fold = np.arange(40) // 20
    found = view_figures(y, scores, is_distorted, control=scores[:, 2], fold=fold)
    assert found["clean"]["auc"] == pytest.approx(roc_auc(y, scores[:, 0]))
    robust = np.mean([roc_auc(y, scores[:, 1]), roc_auc(y[10:], scores[10:, 2])])
    assert found["robust"]["auc"] == pytest.approx(robust)
    # The control is on the same images, here the same scores in one of the two views.
    same = np.mean([roc_auc(y, scores[:, 2]), roc_auc(y[10:], scores[10:, 2])])
    assert found["robust"]["control"]["auc"] == pytest.approx(same)
    assert found["robust"]["exceeds"]["difference"] == pytest.approx(robust - same)
    halves = np.mean([roc_auc(y[fold == part], scores[fold == part, 0]) for part in (0, 1)])
    assert found["clean"]["within_folds"]["auc"] == pytest.approx(halves)
    some = view_figures(y, scores, is_distorted, inside=fold == 1)
    assert some["clean"]["auc"] == pytest.approx(roc_auc(y[20:], scores[20:, 0]))
