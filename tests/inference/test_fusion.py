"""Fusion of experts: its formulas, what the command line says of it, and the fit with known optima."""

import itertools
import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from featdistill.__main__ import main
from featdistill.command_line import UserError
from featdistill.inference import fusion, fusion_fit
from featdistill.inference.fusion import Fusion, parse_fusion, parse_weights
from featdistill.inference.fusion_fit import Labeled
from featdistill.records.manifest import make_manifest, write_manifest
from featdistill.records.predictions import manifest_entry, write_predictions

NAMES = ["clip_l14_a", "siglip_a", "siglip_b"]
WEIGHTS = {"siglip_b": 0.5, "clip_l14_a": 0.2, "siglip_a": 0.3}
TEMPERATURE = {"siglip_a": 2.0, "siglip_b": 0.5, "clip_l14_a": 1.5}


def random_logits(count=200, experts=3, seed=0):
    return np.random.default_rng(seed).normal(0, 6, (experts, count)).astype(np.float32)


def labeled(logits, label, group=None):
    logits = np.asarray(logits, dtype=np.float64)
    group = [f"row {row}" for row in range(len(label))] if group is None else group
    names = [f"e{number}" for number in range(len(logits))]
    label = np.asarray(label)
    return Labeled(names, logits, label, np.asarray(group, dtype=object), np.full(len(label), -1))


def evidence(count, rng):
    """Return labels and a function that makes independent experts whose logits are calibrated log odds."""
    label = rng.permutation(np.arange(count) % 2)
    # Normal at -1 and +1 with unit variance: the log odds of x are 2x.
    return label, lambda noise=1.0: 2 * (2 * label - 1 + noise * rng.normal(size=count)) / noise**2


def test_the_mean_of_probabilities_has_not_changed_in_the_last_bit():
    logits = random_logits()
    # The arithmetic of the predictions before weights and temperatures existed.
    small = np.exp(-np.abs(logits.astype(np.float64)))
    former = (np.where(logits >= 0, 1, small) / (1 + small)).mean(axis=0)
    fused = Fusion().apply(logits, NAMES)
    assert fused.dtype == np.float64
    assert np.array_equal(fused, former)


def test_weights_and_temperatures_enter_as_the_formulas_say():
    logits = random_logits().astype(np.float64)
    weight = np.array([0.2, 0.3, 0.5])[:, None]
    divided = logits / np.array([1.5, 2.0, 0.5])[:, None]
    expected = {
        "logit_mean": 1 / (1 + np.exp(-(weight * divided).sum(axis=0))),
        "probability_mean": (weight / (1 + np.exp(-divided))).sum(axis=0),
    }
    for method, values in expected.items():
        found = Fusion(method, WEIGHTS, TEMPERATURE).apply(logits, NAMES)
        np.testing.assert_allclose(found, values, rtol=1e-12)
    plain = Fusion("logit_mean").apply(logits, NAMES)
    np.testing.assert_allclose(plain, 1 / (1 + np.exp(-logits.mean(axis=0))), rtol=1e-12)


@pytest.mark.parametrize("method", fusion.METHODS)
def test_huge_logits_stay_in_range_without_overflow(method):
    logits = np.array([[1e4, -1e4, 1e4, 0], [1e4, -1e4, -1e4, 0], [1e4, -1e4, 0, 0]], dtype=np.float32)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for chosen in (Fusion(method), Fusion(method, WEIGHTS, dict.fromkeys(NAMES, 0.01))):
            score = chosen.apply(logits, NAMES)
            assert ((score >= 0) & (score <= 1)).all()
            np.testing.assert_allclose(score[[0, 1, 3]], [1, 0, 0.5], atol=1e-15)


def test_rounded_weights_never_bring_a_probability_above_one():
    logits = np.full((10, 1), 100.0)
    names = [f"e{number}" for number in range(10)]
    above = 0
    for seed in range(50):
        weights = np.random.default_rng(seed).random(10)
        chosen = Fusion("probability_mean", dict(zip(names, weights.tolist(), strict=True)))
        above += float(sum(chosen.weights[name] * 1.0 for name in names)) > 1
        assert chosen.apply(logits, names)[0] <= 1
    assert above, "no case went above 1, so this test shows nothing"


@pytest.mark.parametrize("method", fusion.METHODS)
def test_experts_are_told_apart_by_name_not_by_place(method):
    chosen, logits = Fusion(method, WEIGHTS, TEMPERATURE), random_logits()
    expected = chosen.apply(logits, NAMES)
    for order in itertools.permutations(range(3)):
        moved = chosen.apply(logits[list(order)], [NAMES[place] for place in order])
        np.testing.assert_allclose(moved, expected, rtol=1e-13)


def test_one_scale_for_all_logits_does_not_change_the_fused_auc():
    rng = np.random.default_rng(1)
    label, expert = evidence(400, rng)
    logits = np.stack([expert(), expert(2.0), expert()])
    plain, scaled = (
        Fusion("logit_mean", WEIGHTS, {name: factor * value for name, value in TEMPERATURE.items()})
        for factor in (1, 5)
    )
    first, second = plain.apply(logits, NAMES), scaled.apply(logits, NAMES)
    assert not np.allclose(first, second)
    assert roc_auc_score(label, first) == roc_auc_score(label, second)


def test_equal_choices_are_described_by_equal_plain_json():
    first = Fusion("logit_mean", {"a": 2, "b": 1}, {"a": 1, "b": 2.0})
    second = Fusion("logit_mean", {"b": 5.0, "a": 10}, {"b": 2, "a": 1.0})
    assert json.dumps(first.describe()) == json.dumps(second.describe())
    assert json.loads(json.dumps(first.describe())) == first.describe()
    assert first.describe() != Fusion("probability_mean", {"a": 2, "b": 1}, {"a": 1, "b": 2.0}).describe()
    assert Fusion().describe() == {"method": "probability_mean", "weights": None, "temperature": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("logit_maen",), "unknown fusion 'logit_maen' .did you mean logit_mean"),
        (("logit_mean", {"a": -1.0}), "weight of expert a is -1.0"),
        (("logit_mean", {"a": float("nan")}), "weight of expert a is nan"),
        (("logit_mean", {"a": 0.0, "b": 0.0}), "all weights are 0"),
        (("logit_mean", None, {"a": 0.0}), "temperature of expert a is 0.0"),
    ],
)
def test_a_fusion_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Fusion(*arguments)


def test_a_fusion_of_other_experts_is_refused():
    chosen = Fusion("logit_mean", {"a": 1.0, "b": 1.0})
    with pytest.raises(UserError, match="no weight for expert c"):
        chosen.apply(random_logits(), ["a", "b", "c"])
    with pytest.raises(UserError, match="a weight for unknown experts: b"):
        chosen.check(["a"])
    with pytest.raises(UserError, match="no temperature for expert b"):
        Fusion("logit_mean", None, {"a": 1.0}).check(["a", "b"])


def test_weights_are_read_from_the_command_line():
    assert parse_weights("siglip_a=1, clip_l14_a=2,siglip_b=1", NAMES) == {
        "siglip_a": 0.25,
        "clip_l14_a": 0.5,
        "siglip_b": 0.25,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip_l14=1,siglip_a=1,siglip_b=1", "'clip_l14' .did you mean clip_l14_a"),
        ("clip_l14_a=1,siglip_a=-1,siglip_b=1", "siglip_a is -1.0; it must be 0 or more"),
        ("clip_l14_a=0,siglip_a=0,siglip_b=0", "all weights are 0"),
        ("clip_l14_a=1,siglip_a=1", "no weight for expert siglip_b"),
        ("clip_l14_a=1,clip_l14_a=1,siglip_a=1,siglip_b=1", "names expert clip_l14_a twice"),
        ("clip_l14_a=much,siglip_a=1,siglip_b=1", "clip_l14_a is 'much', not a number"),
        ("clip_l14_a", "'clip_l14_a' is not EXPERT=WEIGHT"),
    ],
)
def test_weights_that_cannot_be_are_refused_by_name(text, message):
    with pytest.raises(UserError, match=message):
        parse_weights(text, NAMES)


def test_a_fusion_is_named_by_its_method_or_its_file(tmp_path):
    for method in fusion.METHODS:
        assert parse_fusion(method) == Fusion(method)
    file = tmp_path / "fusion.json"
    thirds = Fusion("logit_mean", {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1 / 3, "b": 0.1, "c": 7.0})
    file.write_text(json.dumps({"version": 1, **thirds.describe()}))
    assert parse_fusion(str(file)) == thirds
    with pytest.raises(UserError, match=r"'probability_man' .did you mean probability_mean"):
        parse_fusion("probability_man")
    with pytest.raises(UserError, match=r"--fusion nope/fusion\.json does not exist"):
        parse_fusion("nope/fusion.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "was not written by"),
        ("[]", "was not written by"),
        ('{"version": 1, "method": "logit_mean", "weights": [1, 2]}', "was not written by"),
        ('{"version": 1, "method": "logit_mean", "weights": {"a": "x"}}', "was not written by"),
        ('{"version": 2, "method": "logit_mean"}', "has version 2; this program reads 1"),
        ('{"version": 1, "method": "logit_mean", "temperature": {"a": -1}}', "temperature of expert a is -1"),
    ],
)
def test_a_file_that_is_not_a_fusion_is_refused_by_its_path(tmp_path, text, message):
    file = tmp_path / "fusion.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"fusion.json.*{message}"):
        parse_fusion(str(file))


def test_an_expert_that_is_three_times_too_confident_has_the_temperature_three():
    rng = np.random.default_rng(2)
    label, expert = evidence(8000, rng)
    logits = expert()
    assert fusion_fit.fit_temperature(logits, label) == pytest.approx(1, rel=0.05)
    sure = fusion_fit.fit_temperature(3 * logits, label)
    assert sure == pytest.approx(3 * fusion_fit.fit_temperature(logits, label), rel=1e-4)

    def loss(temperature):
        return np.logaddexp(0, (1 - 2 * label) * 3 * logits / temperature).mean()

    assert loss(sure) <= min(loss(value) for value in np.linspace(1, 10, 500)) + 1e-6


def test_an_expert_of_noise_or_of_inverted_scores_has_no_temperature():
    rng = np.random.default_rng(3)
    label, expert = evidence(1000, rng)
    assert fusion_fit.fit_temperature(rng.normal(size=1000), label) is None
    assert fusion_fit.fit_temperature(-expert(), label) is None
    assert fusion_fit.fit_temperature(np.zeros(1000), label) is None
    assert np.isfinite(fusion_fit.fit_temperature(np.where(label == 1, 9.0, -9.0), label))


@pytest.mark.parametrize("method", fusion.METHODS)
def test_noise_has_weight_zero_and_permuting_experts_permutes_weights(method):
    rng = np.random.default_rng(4)
    label, expert = evidence(1500, rng)
    logits = np.stack([expert(), rng.normal(0, 3, 1500), 3 * expert(1.5)])
    fitted = fusion_fit.fit(labeled(logits, label), method).fusion
    assert fitted.weights["e1"] == 0
    assert min(fitted.weights["e0"], fitted.weights["e2"]) > 0.1
    assert sum(fitted.weights.values()) == pytest.approx(1, abs=1e-12)
    moved = fusion_fit.fit(labeled(logits[[2, 0, 1]], label), method).fusion
    for first, second in (("e0", "e1"), ("e1", "e2"), ("e2", "e0")):
        assert moved.weights[second] == pytest.approx(fitted.weights[first], abs=1e-4)
        assert moved.temperature[second] == pytest.approx(fitted.temperature[first], rel=1e-3)


def test_an_expert_that_only_repeats_another_with_noise_gets_less_weight():
    rng = np.random.default_rng(5)
    label, expert = evidence(4000, rng)
    good = expert()
    logits = np.stack([good, good + rng.normal(0, 2, 4000)])
    for method in fusion.METHODS:
        fitted = fusion_fit.fit_strengths(labeled(logits, label), method, (1e-3,))[1e-3]
        assert fitted.weights["e1"] < 0.1


@pytest.mark.parametrize("strength", [0.0, 0.05])
@pytest.mark.parametrize("method", fusion.METHODS)
def test_fitted_weights_are_better_than_all_weights_on_a_grid(method, strength):
    rng = np.random.default_rng(6)
    label, expert = evidence(300, rng)
    first = expert()
    columns = np.stack([first, 0.5 * first + expert(3.0)])
    sign = 2 * label - 1
    ai = (label == 1).sum()
    target = np.where(label == 1, (ai + 1) / (ai + 2), 1 / (300 - ai + 2))

    def loss(weights):
        weights = np.asarray(weights)
        pull = strength * ((weights - weights.mean()) ** 2).sum()
        if method == "probability_mean":
            return pull - np.log(weights @ (1 / (1 + np.exp(-sign * columns)))).mean()
        logit = weights @ columns
        return pull + (np.logaddexp(0, logit) - target * logit).mean()

    found = fusion_fit.fit_weights(columns, label, method, strength)
    if method == "probability_mean":
        grid = [(value, 1 - value) for value in np.linspace(0, 1, 400)]
        assert found.sum() == pytest.approx(1, abs=1e-9)
    else:
        grid = itertools.product(np.linspace(0, 2, 60), repeat=2)
    assert (found >= 0).all()
    assert loss(found) <= min(map(loss, grid)) + 1e-9


@pytest.mark.parametrize("method", fusion.METHODS)
def test_a_strong_pull_makes_the_weights_equal(method):
    rng = np.random.default_rng(7)
    label, expert = evidence(600, rng)
    good = expert()
    rows = labeled(np.stack([good, good + rng.normal(0, 2, 600)]), label)
    free, equal = fusion_fit.fit_strengths(rows, method, (1e-4, 1e4)).values()
    assert free.weights["e0"] > 0.8
    assert equal.weights["e0"] == pytest.approx(0.5, abs=1e-3)


def test_the_evidence_of_independent_experts_adds_up():
    rng = np.random.default_rng(13)
    label, expert = evidence(8000, rng)
    logits = np.stack([expert(), expert(1.5)])
    rows = labeled(logits, label)
    fitted = fusion_fit.fit_strengths(rows, "logit_mean", (0.01,))[0.01]
    # Log odds of independent evidence add: the mean of two has the weights 1/2 and the temperatures 1/2.
    assert list(fitted.weights.values()) == pytest.approx([0.5, 0.5], abs=0.05)
    assert list(fitted.temperature.values()) == pytest.approx([0.5, 0.5], rel=0.1)
    score = fitted.apply(logits, rows.names)
    np.testing.assert_allclose(score, fusion.probabilities(logits.sum(axis=0)), atol=0.05)


def test_experts_without_evidence_are_averaged_plainly():
    rng = np.random.default_rng(8)
    rows = labeled(rng.normal(size=(2, 200)), np.arange(200) % 2)
    fitted = fusion_fit.fit(rows)
    assert fitted.fusion == Fusion("logit_mean")
    assert set(fitted.temperature_alone.values()) == {None}


def test_a_group_is_never_on_both_sides_of_a_fold():
    # Experts that know each group by heart and nothing of labels: what they seem to tell does not transfer.
    group = np.repeat(np.arange(30), 8)
    label, group_names = group % 2, [f"group {number}" for number in group]
    together, ignored = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        logits = 2 * rng.normal(size=(24, 30))[:, group] + 0.1 * rng.normal(size=(24, 240))
        fitted = fusion_fit.fit(labeled(logits, label, group_names), folds=3)
        assert all(len(set(fitted.fold[group == number])) == 1 for number in range(30))
        together.append(roc_auc_score(label, fitted.held_out))
        ignored.append(roc_auc_score(label, fusion_fit.fit(labeled(logits, label), folds=3).held_out))
    assert np.mean(ignored) > 0.7
    assert np.mean(together) < 0.6


def test_folds_hold_both_labels_alike_and_do_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(10)
    group = rng.integers(0, 60, 500)
    label = np.where(group < 20, 0, np.where(group < 40, 1, rng.integers(0, 2, 500)))
    rows = labeled(np.zeros((2, 500)), label, [f"group {number}" for number in group])
    fold = fusion_fit.assign_folds(rows, 5, 0)
    for number in range(5):
        held = fold == number
        assert 60 <= held.sum() <= 140
        assert 0.35 < label[held].mean() < 0.65
    order = rng.permutation(500)
    assert np.array_equal(fusion_fit.assign_folds(rows.rows(order), 5, 0), fold[order])
    assert not np.array_equal(fusion_fit.assign_folds(rows, 5, 1), fold)


def test_too_few_groups_of_a_label_are_refused():
    rows = labeled(
        np.zeros((2, 40)), [0] * 20 + [1] * 20, ["x"] * 18 + ["y"] * 2 + list("abcdefghijklmnopqrst")
    )
    with pytest.raises(UserError, match="label 0 is in 2 groups"):
        fusion_fit.assign_folds(rows, 5, 0)
    with pytest.raises(UserError, match="--folds: must be 3 or more, not 2"):
        main(["fuse", "--predictions", "val.csv", "--out", "fusion.json", "--folds", "2"])


@pytest.fixture
def make_files(tmp_path):
    """Return a function that writes predictions of two experts and their manifest."""

    def make(
        name="val", count=240, seed=11, noise=(1.0, 3.0), experts=("clip", "siglip"), unknown=0, scale=1
    ):
        rng = np.random.default_rng(seed)
        label, expert = evidence(count, rng)
        names = [f"{name}_{row:04d}.jpg" for row in range(count)]
        columns = {"image": names, "name": names, "label": label.tolist()}
        columns["label"][:unknown] = [None] * unknown
        manifest, path = tmp_path / f"{name}_manifest.csv", tmp_path / f"{name}.csv"
        write_manifest(make_manifest(columns), manifest)
        # The last expert is too sure by `scale`.
        scales = [1] * (len(noise) - 1) + [scale]
        values = np.stack(
            [fusion.probabilities(by * expert(level)) for level, by in zip(noise, scales, strict=True)]
        )
        sidecar = {"manifest": manifest_entry(manifest, path), "experts": dict.fromkeys(experts, "f" * 64)}
        write_predictions(path, names, values.mean(axis=0), dict(zip(experts, values, strict=True)), sidecar)
        return path, manifest

    return make


def run(*arguments):
    main(["fuse", *map(str, arguments)])


def test_the_fit_writes_a_fusion_with_its_sources_and_the_same_bytes_again(make_files, tmp_path, capsys):
    val, val_manifest = make_files()
    hard, _ = make_files("hard", seed=12, unknown=40)
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    run("--predictions", val, hard, "--out", first)
    text = capsys.readouterr().out
    run("--predictions", val, hard, "--out", second)
    assert first.read_bytes() == second.read_bytes()
    content = json.loads(first.read_text())
    assert content["fitted_on"]["rows"] == 440
    assert [file["predictions"] for file in content["fitted_on"]["files"]] == ["val.csv", "hard.csv"]
    assert content["fitted_on"]["files"][0]["labels_sha256"] == fusion_fit.atomic.sha256_of(val_manifest)
    assert sum(fold["rows"] for fold in content["folds"]) == 440
    read = parse_fusion(str(first))
    assert read.describe() == {key: content[key] for key in ("method", "weights", "temperature")}
    rows, _ = fusion_fit.read_labeled([str(val), str(hard)], None)
    score = read.apply(rows.logits, rows.names)
    table = content["scores"]
    assert table["logit_mean, fitted, the same rows"]["auc"] == roc_auc_score(rows.label, score)
    assert table["clip"]["auc"] == roc_auc_score(rows.label, rows.logits[0])
    assert f"{table['logit_mean, fitted, held-out rows']['auc']:.5f}" in text


def test_a_fit_that_gains_nothing_warns(make_files, tmp_path, caplog):
    path, _ = make_files(noise=(1.0, 1.0), count=60)
    run("--predictions", path, "--out", tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["held_out_gain"]["auc"] <= 0
    assert "the fitted weights are not better than equal ones on held-out folds" in caplog.text
    caplog.clear()
    uneven, _ = make_files("uneven", noise=(1.0, 2.0), scale=12)
    run("--predictions", uneven, "--out", tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["held_out_gain"]["auc"] > 0
    assert "not better" not in caplog.text


def test_official_labels_give_the_fit_of_the_manifest(make_files, tmp_path):
    path, manifest = make_files()
    official = tmp_path / "labels.csv"
    rows, _ = fusion_fit.read_labeled([str(path)], [str(manifest)])
    lines = [f"val_{row:04d},{label}" for row, label in enumerate(rows.label)]
    official.write_text("image_name,label\n" + "\n".join(lines[::-1]) + "\n")
    again, _ = fusion_fit.read_labeled([str(path)], [str(official)])
    assert np.array_equal(rows.label, again.label)
    assert np.array_equal(rows.logits, again.logits)


def test_the_groups_of_a_manifest_are_read_and_rows_without_one_are_their_own(make_files):
    path, manifest = make_files(count=6)
    names = [f"val_{row:04d}.jpg" for row in range(6)]
    columns = {"image": names, "name": names, "label": [0, 1] * 3, "group": ["x", "x", "", "", "y", "x"]}
    write_manifest(make_manifest(columns), manifest)
    rows, _ = fusion_fit.read_labeled([str(path)], [str(manifest)])
    assert rows.group.tolist() == ["x", "x", f"name:{names[2]}", f"name:{names[3]}", "y", "x"]


def test_input_that_cannot_be_fitted_is_refused_by_its_path(make_files, tmp_path):
    path, manifest = make_files()
    other, _ = make_files("other", experts=("clip", "dino"))
    one, _ = make_files("one", experts=("clip",), noise=(1.0,))
    cases = [
        ([path, other], None, "other.csv has the experts clip, dino"),
        ([one], None, "columns of 1 expert; a fit needs two"),
        ([path], [tmp_path / "absent.csv"], "absent.csv do not exist"),
        ([path], [tmp_path / "other_manifest.csv"], "val.csv: names that are not in"),
        ([path], [manifest] * 2, "2 label files for 1 predictions"),
        ([path, tmp_path / "." / path.name], None, "named twice: its rows would count twice"),
    ]
    for predictions, labels, message in cases:
        with pytest.raises(UserError, match=message):
            fusion_fit.read_labeled(list(map(str, predictions)), labels and list(map(str, labels)))
    text = path.read_text().splitlines()
    bare = tmp_path / "bare.csv"
    bare.write_text("\n".join(text) + "\n")
    with pytest.raises(UserError, match=r"bare.csv has no sidecar"):
        fusion_fit.read_labeled([str(bare)], None)
    name, score, *_ = text[1].split(",")
    bare.write_text("\n".join([text[0], f"{name},{score},1.5,0.1", *text[2:]]) + "\n")
    with pytest.raises(UserError, match=r"bare.csv: column clip has numbers outside"):
        fusion_fit.read_labeled([str(bare)], [str(manifest)])
