import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from featdistill.bank import heads
from featdistill.bank.heads import HeadOptions, cross_fit, fit_heads, grouped_folds, out_of_fold_scores
from featdistill.command_line import UserError
from featdistill.evaluation.metrics import roc_auc


@pytest.fixture
def task():
    """Return features (60, 12) of which some tell the classes apart, and labels; means are far from 0."""
    rng = np.random.default_rng(0)
    y = np.tile([0, 1], 30)
    x = rng.normal(size=(60, 12)) + y[:, None] * np.linspace(0, 0.8, 12)
    return (x * np.linspace(0.1, 5, 12) + np.linspace(-30, 30, 12)).astype(np.float32), y


def test_linear_heads_are_those_of_scikit_learn_on_standardized_features(task):
    x, y = task
    path = (0.001, 0.1, 10)
    scaled = StandardScaler().fit_transform(x.astype(np.float64))
    for head, strength in zip(fit_heads(x, y, options=HeadOptions(path=path)), path, strict=True):
        model = LogisticRegression(C=strength, tol=1e-8, max_iter=1000).fit(scaled, y)
        assert head.strength == strength
        assert np.abs(head.logits(x) - model.decision_function(scaled)).max() < 0.02
        assert head.layers[0][0].dtype == np.float32 and head.layers[0][0].shape == (1, 12)


def test_mlp_heads_are_those_of_scikit_learn(task):
    x, y = task
    scaled = StandardScaler().fit_transform(x.astype(np.float64)).astype(np.float32)
    model = MLPClassifier((8,), alpha=0.1, max_iter=heads._MLP_EPOCHS, random_state=3)
    with pytest.warns(match="Maximum iterations"):
        model.fit(scaled, y)
    (head,) = fit_heads(x, y, options=HeadOptions("mlp", (0.1,), hidden=8, seed=3))
    assert [weight.shape for weight, _ in head.layers] == [(8, 12), (1, 8)]
    probability = 1 / (1 + np.exp(-head.logits(x)))
    assert np.abs(probability - model.predict_proba(scaled)[:, 1]).max() < 1e-4


def test_a_constant_feature_has_no_effect(task):
    x, y = task
    added = np.concatenate([x, np.full((60, 1), 1000.1, np.float32)], axis=1)
    plain, more = (fit_heads(values, y)[8] for values in (x, added))
    assert np.allclose(plain.logits(x), more.logits(added), atol=1e-3)


def test_views_count_as_rows_and_weights_as_repetitions(task):
    x, y = task
    options = HeadOptions(path=(0.05,))
    views = np.stack([x, x + 1], axis=1)
    (of_views,), (of_rows,) = (
        fit_heads(views, y, options=options),
        fit_heads(views.reshape(-1, 12), np.repeat(y, 2), options=options),
    )
    assert np.array_equal(of_views.layers[0][0], of_rows.layers[0][0])
    assert of_views.logits(views).shape == (60, 2)
    # Images that count twice are images that are there twice, once the mean weight is 1 again.
    counts = np.where(np.arange(60) < 20, 2.0, 1.0)
    seldom = HeadOptions(path=(0.05 * counts.mean(),))
    again = np.concatenate([x, x[:20]]), np.concatenate([y, y[:20]])
    (repeated,), (weighted,) = (
        fit_heads(*again, options=options),
        fit_heads(x, y, weights=counts, options=seldom),
    )
    # They are standardized by other means, which only regularization notices.
    assert np.corrcoef(repeated.logits(x), weighted.logits(x))[0, 1] > 0.999


def test_held_out_scores_do_not_depend_on_the_labels_of_their_fold(task):
    x, y = task
    fold = np.arange(60) // 12
    changed = np.where(fold == 2, 1 - y, y)
    options = HeadOptions(path=(0.1,))
    before, after = (out_of_fold_scores(x, labels, fold, options=options) for labels in (y, changed))
    assert np.array_equal(before[fold == 2], after[fold == 2])
    assert not np.array_equal(before, after)
    chosen = out_of_fold_scores(x, y, fold)
    assert roc_auc(y, chosen) > 0.7 and chosen.min() >= 0 and chosen.max() <= 1


def test_excluded_images_are_not_trained_on_and_features_may_depend_on_the_training_images(task):
    x, y = task
    fold, seen = np.arange(60) // 30, []

    def features(trained):
        seen.append(trained)
        return x[:, None], np.stack([x, x, x], axis=1)

    logits = cross_fit(
        features, y, fold, excluded=lambda held: np.arange(60) % 7 == 0, options=HeadOptions(path=(0.1, 1))
    )
    assert logits.shape == (2, 60, 3) and np.allclose(logits[..., 0], logits[..., 2])
    assert [trained.sum() for trained in seen] == [26, 25] and not any(trained[7] for trained in seen)
    head = fit_heads(x[seen[0]], y[seen[0]], options=HeadOptions(path=(0.1, 1)))[1]
    assert np.allclose(head.logits(x[:30]), logits[1, :30, 0])


def test_the_regularization_is_the_best_one_on_the_folds_of_both_classes():
    y, fold = np.array([0, 1, 0, 1, 1, 0]), np.array([0, 0, 1, 1, 2, 2])
    good, bad = y - 0.5, 0.5 - y
    mixed = np.where(fold == 0, bad, good)
    logits = np.stack([bad, mixed, good])[:, :, None]
    assert heads.best(logits, y, fold) == 2
    assert heads.best(logits, y, fold, without=0) == 1  # equally good there, and stronger
    # Fold 1 is of one class: it is compared with all held-out images of the other one.
    one_class = np.array([0, 0, 1, 1, 0, 0])
    scores = np.array([0, 1, 2, 3, 0, 1.0])
    assert heads.best(np.stack([-scores, scores])[:, :, None], one_class, np.array([0, 0, 1, 1, 2, 2])) == 1


def test_folds_keep_groups_together_and_hold_both_classes():
    y, group = np.repeat([0, 1], 30), np.repeat([f"group {n}" for n in range(20)], 3)
    fold = grouped_folds(y, group, 5)
    assert all(len(set(fold[group == name])) == 1 for name in group)
    assert all(set(y[fold == number]) == {0, 1} for number in range(5))
    assert set(grouped_folds(y, np.where(y, "a", "b") + (np.arange(60) % 3).astype(str), 5)) == {0, 1, 2}


def test_what_cannot_be_fitted_is_refused(task):
    x, y = task
    with pytest.raises(UserError, match="same label"):
        fit_heads(x, np.ones(60))
    with pytest.raises(UserError, match="not finite"):
        fit_heads(np.where(x == x[3, 3], np.nan, x), y)
    with pytest.raises(UserError, match="at least two folds"):
        cross_fit(x, y, np.zeros(60))
    with pytest.raises(UserError, match="at least two groups"):
        grouped_folds(y, y)
    with pytest.raises(UserError, match="did you mean linear"):
        HeadOptions("linea")
