"""The metrics against values counted by hand and against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from featdistill.evaluation import metrics
from featdistill.evaluation.experts import per_expert

LABEL = np.array([0, 0, 1, 1, 0, 0, 1, 1])
SCORE = np.array([0.1, 0.4, 0.35, 0.8, 0.6, 0.2, 0.6, 0.5])
DISTORTED = np.array([0, 0, 0, 0, 1, 1, 1, 1])


def pairs_won(label, score):
    """The share of (real, AI) pairs in which the AI image has the larger score, ties half."""
    gap = score[label == 1][:, None] - score[label == 0][None, :]
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())


def made_up(rows=400, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, rows)
    return label, np.round(0.3 * label + 0.7 * rng.random(rows), 2), rng.integers(0, 2, rows), rng


def test_headline_has_the_values_counted_by_hand():
    found = metrics.headline(LABEL, SCORE, DISTORTED)
    # Clean: 0.35 beats 0.1 alone, 0.8 beats both. Distorted: 0.6 beats 0.2 and ties 0.6; 0.5 beats 0.2.
    assert found["clean_auc"] == 0.75
    assert found["robust_auc"] == 2.5 / 4
    # Above 0.5: 0.8, 0.6 (real), 0.6 (AI); a score of exactly 0.5 counts as real.
    assert (found["accuracy"], found["real_accuracy"], found["ai_accuracy"]) == (5 / 8, 3 / 4, 2 / 4)
    counts = {"images": 8, "real": 4, "ai": 4, "clean": 4, "distorted": 4, "ai_share": 0.5, "undefined": {}}
    assert {key: found[key] for key in counts} == counts


def test_headline_agrees_with_counted_pairs_and_scikit_learn_where_scores_tie():
    label, score, distorted, _ = made_up()
    found = metrics.headline(label, score, distorted)
    assert len(set(score.tolist())) < len(score)
    for key, rows in (("clean_auc", distorted == 0), ("robust_auc", distorted == 1), ("auc", distorted >= 0)):
        assert found[key] == pytest.approx(pairs_won(label[rows], score[rows]), abs=1e-12)
        assert found[key] == roc_auc_score(label[rows], score[rows])
    assert found["average_precision"] == average_precision_score(label, score)


def test_only_ranks_count_even_where_float32_would_saturate():
    label, score, _, _ = made_up()
    squeezed = 1 - (1 - score) * 1e-13
    assert len(np.unique(squeezed.astype(np.float32))) == 1
    assert metrics.roc_auc(label, squeezed) == metrics.roc_auc(label, score)


def test_scores_that_all_tie_give_one_half():
    assert metrics.roc_auc([0, 1, 1], [1.0, 1.0, 1.0]) == 0.5


def test_one_class_is_not_defined_and_says_why():
    found = metrics.headline(np.ones(3, int), np.array([0.1, 0.6, 0.9]), np.array([1, 1, 1]))
    curves = ("auc", "average_precision", "tpr_at_fpr_1", "tpr_at_fpr_5", "eer")
    undefined = ("clean_auc", "robust_auc", *curves, "real_accuracy")
    assert all(found[key] is None for key in undefined)
    assert found["ai_accuracy"] == found["accuracy"] == 2 / 3
    assert found["undefined"] == {
        "clean_auc": "no clean images",
        "robust_auc": "all distorted images are AI-generated",
        **dict.fromkeys(curves, "all images are AI-generated"),
        "real_accuracy": "no real images",
    }


def test_unknown_distortion_leaves_clean_and_robust_undefined_only():
    found = metrics.headline(LABEL, SCORE, np.full(8, -1))
    assert set(found["undefined"]) == {"clean_auc", "robust_auc"}
    assert "do not say" in found["undefined"]["clean_auc"]
    assert found["auc"] == pairs_won(LABEL, SCORE)


def test_no_images_and_logits_do_not_crash():
    empty = metrics.headline(np.array([], int), np.array([]), np.array([], int))
    assert empty["images"] == 0 and empty["auc"] is None and empty["accuracy"] is None
    logits = metrics.headline(LABEL, SCORE * 9 - 4, DISTORTED)
    assert logits["clean_auc"] == 0.75 and logits["accuracy"] is None
    assert logits["brier"] is logits["ece"] is None and logits["reliability"] == []
    assert logits["undefined"]["accuracy"] == "scores are outside [0, 1]"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused_everywhere(bad):
    score = np.where(np.arange(8) == 3, bad, SCORE)
    calls = [
        lambda: metrics.roc_auc(LABEL, score),
        lambda: metrics.headline(LABEL, score, DISTORTED),
        lambda: metrics.best_threshold(LABEL, score),
        lambda: metrics.accuracies(LABEL, score),
        lambda: per_expert(LABEL, SCORE, DISTORTED, {"clip": score}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="finite"):
            call()


@pytest.mark.parametrize(
    ("label", "score", "distorted"),
    [
        ([0, 2], [0.1, 0.2], [0, 0]),
        ([0, 1], [0.1], [0, 0]),
        ([0, 1], [0.1, 0.2], [0, 3]),
        ([0, 1], [0.1, 0.2], [0]),
    ],
)
def test_wrong_labels_and_lengths_are_refused(label, score, distorted):
    with pytest.raises(ValueError):
        metrics.headline(np.array(label), np.array(score), np.array(distorted))


# Few distinct values, so that nearly all scores tie.
TIED = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=30)


@settings(max_examples=60, deadline=None)
@given(TIED)
def test_tied_scores_give_the_values_counted_over_all_thresholds(pairs):
    label, score = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs]) / 8
    found = metrics.headline(label, score, np.ones(len(label)))
    if label.min() == label.max():
        assert found["auc"] is found["average_precision"] is found["eer"] is found["tpr_at_fpr_1"] is None
        return
    assert found["auc"] == pytest.approx(pairs_won(label, score), abs=1e-12)
    assert found["auc"] == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    steps = [np.inf, *sorted(set(score.tolist()), reverse=True)]
    fpr, tpr = ([float((score[label == own] >= step).mean()) for step in steps] for own in (0, 1))
    for name, rate in metrics.RATES.items():
        assert found[name] == max(hit for alarm, hit in zip(fpr, tpr, strict=True) if alarm <= rate)
    # Average precision by its definition: the precision at each threshold, weighted by the recall it adds.
    precision = [float(label[score >= step].mean()) for step in steps[1:]]
    assert found["average_precision"] == pytest.approx(np.dot(np.diff(tpr), precision), abs=1e-12)
    assert found["average_precision"] == pytest.approx(average_precision_score(label, score), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(TIED)
def test_at_the_equal_error_rate_the_curve_meets_the_falling_diagonal(pairs):
    label, score = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs]) / 8
    curve = metrics.roc_curve(label, score)
    if curve is None:
        return
    rate = metrics.equal_error_rate(curve)
    fpr, tpr, _ = curve
    # The highest and the lowest point of the curve at this rate: on a vertical step they are not one.
    high = np.interp(rate + 1e-9, fpr, tpr)
    low = 1 - np.interp(1 - rate + 1e-9, 1 - fpr[::-1], 1 - tpr[::-1])
    assert low - 1e-6 <= 1 - rate <= high + 1e-6


def test_errors_at_a_rate_have_the_values_counted_by_hand():
    label = np.repeat([0, 1], [20, 4])
    score = np.r_[np.arange(20) / 40, 0.05, 0.46, 0.475, 0.9]
    found = metrics.headline(label, score, np.ones(24))
    # One false alarm of twenty is 5 %: of 0.475, which ties an AI-generated image.
    assert found["tpr_at_fpr_1"] == 1 / 4 and found["tpr_at_fpr_5"] == 3 / 4
    # Three of four found, until the threshold falls to the fifth step: a quarter of both is wrong there.
    assert found["eer"] == pytest.approx(0.25)
    perfect = metrics.headline(LABEL, LABEL / 1.0, DISTORTED)
    assert (perfect["eer"], perfect["tpr_at_fpr_1"], perfect["brier"], perfect["ece"]) == (0, 1, 0, 0)
    assert metrics.headline(LABEL, 1.0 - LABEL, DISTORTED)["eer"] == 1


def test_the_threshold_is_that_of_the_best_balanced_accuracy_and_lies_between_scores():
    label, score, _, _ = made_up()
    threshold = metrics.best_threshold(label, score)
    candidates = [score.min() - 1, *np.unique(score)]
    reached = [balanced(label, score, own) for own in (threshold, *candidates)]
    assert reached[0] == max(reached) and threshold not in score
    assert metrics.best_threshold([0, 1], [0.2, 0.6]) == pytest.approx(0.4)
    neighbors = np.array([0.5, np.nextafter(0.5, 1)])
    assert balanced(np.array([0, 1]), neighbors, metrics.best_threshold([0, 1], neighbors)) == 1
    # Where every cut is worse than none, nothing is flagged, or everything.
    for labels in ([1, 0], [1, 0, 0]):
        values = np.arange(len(labels)) / 4
        assert balanced(np.array(labels), values, metrics.best_threshold(labels, values)) == 0.5
    assert metrics.best_threshold([1, 1], [0.2, 0.6]) is None


def balanced(label, score, threshold):
    found = metrics.accuracies(label, score, threshold)
    return (found["real_accuracy"] + found["ai_accuracy"]) / 2


def test_experts_stand_beside_their_mean_and_the_ensemble():
    label, score, distorted, rng = made_up()
    experts = {name: score + rng.normal(0, 0.3, len(score)) for name in ("clip", "dino")}
    found = per_expert(label, score, distorted, experts)
    for key, rows in (("clean_auc", distorted == 0), ("robust_auc", distorted == 1)):
        alone = [roc_auc_score(label[rows], values[rows]) for values in experts.values()]
        assert [result[key] for result in found["experts"].values()] == alone
        assert found["mean"][key] == pytest.approx(np.mean(alone), abs=1e-15)
        assert found["ensemble"][key] == roc_auc_score(label[rows], score[rows])


def test_experts_without_distorted_images_have_no_robust_auc():
    found = per_expert(LABEL, SCORE, np.zeros(8), {"clip": SCORE})
    assert found["mean"]["robust_auc"] is None and found["mean"]["clean_auc"] == pairs_won(LABEL, SCORE)
    assert per_expert(LABEL, SCORE, DISTORTED, {})["mean"] == {"clean_auc": None, "robust_auc": None}


def test_bins_contain_the_scores_between_their_edges():
    bins = metrics.reliability([0, 1, 1, 0, 1], [0.0, 0.2, 0.39, 0.4, 1.0], bins=5)
    assert [one["n"] for one in bins] == [1, 2, 1, 0, 1]
    assert [one["low"] for one in bins] == [0, 0.2, 0.4, 0.6, 0.8] and bins[-1]["high"] == 1
    assert bins[1]["mean_score"] == pytest.approx(0.295) and bins[1]["ai_share"] == 1
    assert bins[3]["mean_score"] is bins[3]["ai_share"] is None
    gaps = [1 * 0.0, 2 * 0.705, 1 * 0.4, 1 * 0.0]
    assert metrics.expected_calibration_error(bins) == pytest.approx(sum(gaps) / 5)


def test_calibrated_scores_have_no_calibration_error():
    score = np.repeat(np.arange(10) / 10, 10)
    label = np.tile(np.arange(10), 10) < 10 * score
    bins, wrong = (metrics.reliability(own, score, bins=10) for own in (label, ~label))
    assert metrics.expected_calibration_error(bins) == pytest.approx(0, abs=1e-12)
    assert metrics.expected_calibration_error(wrong) > 0.4
    assert metrics.expected_calibration_error(metrics.reliability([], [])) is None


def test_the_brier_score_is_that_of_scikit_learn():
    label, score, distorted, _ = made_up()
    found = metrics.headline(label, score, distorted)
    assert found["brier"] == pytest.approx(brier_score_loss(label, score), abs=1e-12)
