"""The metrics against values counted by hand and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from featdistill import metrics

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
    return label, np.round(0.5 * label + rng.random(rows) / 2, 2), rng.integers(0, 2, rows), rng


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
    undefined = ("clean_auc", "robust_auc", "auc", "average_precision", "real_accuracy")
    assert all(found[key] is None for key in undefined)
    assert found["ai_accuracy"] == found["accuracy"] == 2 / 3
    assert found["undefined"] == {
        "clean_auc": "no clean images",
        "robust_auc": "all distorted images are AI-generated",
        "auc": "all images are AI-generated",
        "average_precision": "all images are AI-generated",
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
    assert logits["undefined"]["accuracy"] == "scores lie outside [0, 1]"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused_everywhere(bad):
    score = np.where(np.arange(8) == 3, bad, SCORE)
    calls = [
        lambda: metrics.roc_auc(LABEL, score),
        lambda: metrics.headline(LABEL, score, DISTORTED),
        lambda: metrics.per_generator(LABEL, score, [""] * 8),
        lambda: metrics.per_distortion(LABEL, score, [()] * 8),
        lambda: metrics.per_chain_length(LABEL, score, DISTORTED),
        lambda: metrics.per_expert(LABEL, SCORE, DISTORTED, {"clip": score}),
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


def test_each_generator_meets_all_real_images():
    label, score, _, rng = made_up()
    generator = np.where(label == 1, rng.choice(["flux", "sdxl", ""], len(label)), "")
    found = metrics.per_generator(label, score, generator.tolist())
    assert list(found) == ["flux", "sdxl"]
    for name, result in found.items():
        own = generator == name
        rows = own | (label == 0)
        assert result == {"auc": roc_auc_score(label[rows], score[rows]), "n": int(own.sum())}
    assert metrics.per_generator([1, 1], [0.1, 0.2], ["flux", "flux"]) == {"flux": {"auc": None, "n": 2}}


def test_each_distortion_takes_the_rows_whose_chain_holds_it():
    label, score, _, rng = made_up()
    names = ["jpeg", "downscale", "gausblur", "jpeg"]
    chains = [[names[i] for i in rng.integers(0, 4, rng.integers(0, 4))] for _ in label]
    found = metrics.per_distortion(label, score, chains)
    assert list(found) == ["downscale", "gausblur", "jpeg"]
    for name, result in found.items():
        rows = np.array([name in chain for chain in chains])
        assert result == {"auc": roc_auc_score(label[rows], score[rows]), "n": int(rows.sum())}


def test_chain_lengths_leave_out_those_that_are_not_known():
    length = np.array([0, 0, 0, 0, 2, 2, 2, -1])
    found = metrics.per_chain_length(LABEL, SCORE, length)
    assert found == {"0": {"auc": 0.75, "n": 4}, "2": {"auc": 0.75, "n": 3}}


def test_experts_stand_beside_their_mean_and_the_ensemble():
    label, score, distorted, rng = made_up()
    experts = {name: score + rng.normal(0, 0.3, len(score)) for name in ("clip", "dino")}
    found = metrics.per_expert(label, score, distorted, experts)
    for key, rows in (("clean_auc", distorted == 0), ("robust_auc", distorted == 1)):
        alone = [roc_auc_score(label[rows], values[rows]) for values in experts.values()]
        assert [result[key] for result in found["experts"].values()] == alone
        assert found["mean"][key] == pytest.approx(np.mean(alone), abs=1e-15)
        assert found["ensemble"][key] == roc_auc_score(label[rows], score[rows])


def test_experts_without_distorted_images_have_no_robust_auc():
    found = metrics.per_expert(LABEL, SCORE, np.zeros(8), {"clip": SCORE})
    assert found["mean"]["robust_auc"] is None and found["mean"]["clean_auc"] == pairs_won(LABEL, SCORE)
    assert metrics.per_expert(LABEL, SCORE, DISTORTED, {})["mean"] == {"clean_auc": None, "robust_auc": None}
