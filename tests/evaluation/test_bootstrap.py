"""Draws against scikit-learn on the very images drawn, and their distribution against what it must be."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from featdistill.evaluation import bootstrap
from featdistill.evaluation.bootstrap import (
    Resampling,
    auc_draws,
    auc_interval,
    interval,
    model_draws,
    times_drawn,
)


def slow_draws(real, ai, draws, seed):
    """One draw after the other: the images as often as they are drawn, and scikit-learn's AUC of them."""
    order = [np.argsort(side[0], kind="stable") for side in (real, ai)]
    times = [
        times_drawn(np.random.default_rng([seed, number]), draws, side.shape[1])
        for number, side in enumerate((real, ai))
    ]
    label = np.repeat([0, 1], [real.shape[1], ai.shape[1]])
    values = np.empty((len(real), draws))
    for draw in range(draws):
        chosen = [np.repeat(own, count[draw]) for own, count in zip(order, times, strict=True)]
        for model in range(len(real)):
            score = np.r_[real[model][chosen[0]], ai[model][chosen[1]]]
            values[model, draw] = roc_auc_score(label, score)
    return values


@pytest.mark.parametrize("levels", [7, 10**6])
@pytest.mark.parametrize("models", [1, 3])
def test_every_draw_is_the_auc_of_the_images_drawn(models, levels):
    rng = np.random.default_rng(1)
    real, ai = (rng.integers(low, levels + low, (models, size)) for low, size in ((0, 31), (2, 23)))
    found = auc_draws(real, [ai, ai[:, :5]], Resampling(20, 5))
    assert np.abs(found[0] - slow_draws(real, ai, 20, 5)).max() <= 1e-12
    assert np.abs(found[1] - slow_draws(real, ai[:, :5], 20, 5)).max() <= 1e-12


def test_large_sets_are_drawn_block_by_block_to_the_same_end():
    rng = np.random.default_rng(2)
    images = 2 * 65536 + 1000
    times = times_drawn(np.random.default_rng(3), 2, images)
    assert times.shape == (2, images) and (times.sum(axis=1) == images).all() and times.min() >= 0
    # Drawn with replacement: the counts of an image are nearly Poisson of mean and variance 1, everywhere.
    for part in (times[0, :65536], times[0, 65536:131072], times[1, 131072:]):
        assert part.mean() == pytest.approx(1, abs=6 / len(part) ** 0.5)
        assert part.var() == pytest.approx(1, abs=12 / len(part) ** 0.5)
        assert (part == 0).mean() == pytest.approx(np.exp(-1), abs=3 / len(part) ** 0.5)
    real, ai = rng.normal(0, 1, (1, images)), rng.normal(1, 1, (1, 500))
    assert np.abs(auc_draws(real, [ai], Resampling(2, 4))[0] - slow_draws(real, ai, 2, 4)).max() <= 1e-12


def test_how_many_draws_are_made_at_a_time_changes_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    real, ai = rng.random((2, 40)), rng.random((2, 30))
    found = auc_draws(real, [ai], Resampling(50))[0]
    for cells in (1, 130, 10**6):
        monkeypatch.setattr(bootstrap, "_CELLS", cells)
        assert (auc_draws(real, [ai], Resampling(50))[0] == found).all()


def test_the_order_of_the_images_changes_nothing_and_the_seed_does():
    rng = np.random.default_rng(0)
    label, score = rng.integers(0, 2, 200), rng.random(200)
    order = rng.permutation(200)
    first = auc_interval(label, score, Resampling())
    assert (
        first
        == auc_interval(label[order], score[order], Resampling())
        == auc_interval(label, score, Resampling())
    )
    assert first != auc_interval(label, score, Resampling(seed=1))


def test_the_interval_is_that_of_a_plain_bootstrap():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 300)
    score = rng.normal(label, 1)
    real, ai = score[label == 0], score[label == 1]
    plain = [
        (rng.choice(ai, len(ai))[:, None] > rng.choice(real, len(real))[None]).mean() for _ in range(2000)
    ]
    found = auc_interval(label, score, Resampling(2000))
    width = found[1] - found[0]
    assert found == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=width / 12)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1], 60)
    # Of two normal distributions one standard deviation apart.
    truth = 0.7602499389065233
    held = 0
    for _ in range(200):
        low, high = auc_interval(label, rng.normal(label, 1), Resampling(300))
        held += low <= truth <= high
    assert 0.90 <= held / 200 <= 0.985


def test_draws_are_paired_so_that_a_constant_advantage_has_a_narrow_interval():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 400)
    first = rng.normal(label, 1)
    scores = np.stack([first, first + 0.05 * rng.normal(0, 1, 400)])
    drawn = model_draws(label, scores, Resampling())
    alone, paired = np.subtract(*interval(drawn[0])[::-1]), np.subtract(*interval(drawn[0] - drawn[1])[::-1])
    assert 0 < paired < alone / 5
    same = model_draws(label, np.stack([first, first]), Resampling())
    assert (same[0] == same[1]).all()
    # A model's own interval is the same whoever it is compared with.
    assert interval(drawn[0]) == auc_interval(label, first, Resampling())


def test_one_class_or_no_draws_have_no_interval():
    for label in ([], [1, 1], [0]):
        assert auc_interval(label, np.arange(len(label)) / 4, Resampling()) == (None, None)
    assert auc_interval([0, 1], [0.1, 0.2], Resampling(0)) == (None, None)
    with pytest.raises(ValueError, match="both classes"):
        auc_draws(np.empty((1, 0)), [np.ones((1, 3))], Resampling())
