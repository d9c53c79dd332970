"""Calibrators fitted on predictions: groups, crossing thresholds, probabilities, places without labels."""

import numpy as np
import pytest
from scipy.special import expit

from featdistill.__main__ import calibrate
from featdistill.calibration import Calibrator
from featdistill.calibration.conformal import lower_threshold, upper_threshold
from featdistill.calibration.fit import fit
from featdistill.calibration.mapping import fit_isotonic, fit_platt
from featdistill.calibration.reading import Rows, read_rows
from featdistill.command_line import UserError
from featdistill.records.manifest import make_manifest, write_manifest
from featdistill.records.predictions import manifest_entry, write_predictions


def rows_of(logits, label, stratum=None, by=(), group=None):
    count = np.arange(len(label)).astype(str).astype(object)
    stratum = np.full(len(label), "all images", dtype=object) if stratum is None else stratum
    return Rows(logits, label, count if group is None else group, stratum, by, None, [])


def drawn(rng, images=400, apart=2.0):
    label = np.arange(images) % 2
    return rng.normal(apart * (2 * label - 1), 1.5), label


def write_run(folder, name, logits, label, expert="0" * 64, **columns):
    names = [f"{name}{number:04d}.jpg" for number in range(len(label))]
    given = {"image": names, "name": names, "label": [None if one < 0 else int(one) for one in label]}
    manifest, path = folder / f"{name}_manifest.csv", folder / f"{name}.csv"
    write_manifest(make_manifest(given | columns), manifest)
    sidecar = {
        "experts": {"a": expert},
        "fusion": "probability_mean",
        "manifest": manifest_entry(manifest, path),
    }
    score = expit(np.asarray(logits))
    write_predictions(path, names, score, {"a": score}, sidecar)
    return str(path)


def test_thresholds_are_those_of_each_class():
    logits, label = drawn(np.random.default_rng(0), apart=0.5)
    found = fit(rows_of(logits, label), 0.05, 0.1)
    assert found.ai_threshold == upper_threshold(logits[label == 0], 0.05)
    assert found.real_threshold == lower_threshold(logits[label == 1], 0.1)
    assert (found.real, found.ai) == (200, 200)
    verdicts = found.verdicts(logits)
    assert (verdicts[label == 0] == "AI").mean() <= 0.05 and (verdicts[label == 1] == "real").mean() <= 0.1
    assert found.facts["held_out"]["rates"]["all images"]["fpr"]["n"] == 200


def test_thresholds_that_cross_become_one_and_keep_both_promises():
    logits, label = drawn(np.random.default_rng(0), apart=8)
    found = fit(rows_of(logits, label), 0.05)
    high, low = upper_threshold(logits[label == 0], 0.05), lower_threshold(logits[label == 1], 0.05)
    assert high < low and found.ai_threshold == found.real_threshold == (high + low) / 2
    assert set(found.verdicts(logits)) == {"real", "AI"}


def test_the_worst_group_decides_and_a_small_group_is_refused():
    rng = np.random.default_rng(0)
    logits, label = drawn(rng, 800)
    stratum = np.where(np.arange(800) % 4 < 2, "is_distorted 0", "is_distorted 1").astype(object)
    logits = logits + np.where(stratum == "is_distorted 1", 1.0, 0)
    found = fit(rows_of(logits, label, stratum, ["is_distorted"]), 0.05)
    groups = {
        name: upper_threshold(logits[(label == 0) & (stratum == name)], 0.05) for name in np.unique(stratum)
    }
    assert found.ai_threshold == max(groups.values()) == groups["is_distorted 1"]
    assert "in each group by is_distorted" in found.promise()
    held_out = found.facts["held_out"]["rates"]
    hits = [one["fpr"]["hits"] for one in held_out.values()]
    assert list(held_out) == ["all images", *groups] and hits[0] == hits[1] + hits[2]
    stratum[np.flatnonzero(label == 0)[:10]] = "is_distorted unknown"
    with pytest.raises(
        UserError, match=r"--fpr 0.05 needs at least 19 real images in each group; is_distorted unk"
    ):
        fit(rows_of(logits, label, stratum, ["is_distorted"]), 0.05)


def test_platt_finds_the_sigmoid_that_made_the_labels_and_is_finite_where_classes_are_apart():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20_000)
    label = (rng.random(20_000) < expit(0.5 * logits - 1)).astype(int)
    found = fit_platt(logits, label)
    np.testing.assert_allclose([found["slope"], found["intercept"]], [0.5, -1], atol=0.06)
    apart = fit_platt(np.array([-2.0, -1, 1, 2]), np.array([0, 0, 1, 1]))
    assert 0 < apart["slope"] < 5 and abs(apart["intercept"]) < 1e-6


def test_isotonic_rises_and_stays_inside_zero_and_one():
    logits, label = drawn(np.random.default_rng(0))
    found = fit_isotonic(logits, label)
    assert (np.diff(found["logits"]) > 0).all() and (np.diff(found["probabilities"]) >= 0).all()
    assert found["probabilities"][0] == 1 / 402 and found["probabilities"][-1] == 401 / 402


def test_the_method_with_the_lower_held_out_loss_is_chosen():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 1500)
    smooth = fit(rows_of(logits, (rng.random(1500) < expit(2 * logits)).astype(int)), 0.05)
    steps = fit(
        rows_of(logits, (rng.random(1500) < np.where(np.abs(logits) < 2, 0.5, logits > 0)).astype(int)), 0.05
    )
    for calibrator, method in ((smooth, "platt"), (steps, "isotonic")):
        errors = calibrator.facts["held_out_errors"]
        losses = {name: one["log_loss"] for name, one in errors.items()}
        assert calibrator.method == method == min(losses, key=losses.get)
    errors = smooth.facts["held_out_errors"]
    assert errors["platt"]["ece"] < 0.04 < errors["as they are"]["ece"]


def test_real_images_alone_give_a_threshold_for_ai_only():
    logits = np.random.default_rng(0).normal(size=99)
    found = fit(rows_of(logits, np.zeros(99, int)), 0.01)
    assert (found.ai_threshold, found.real_threshold, found.method) == (logits.max(), None, None)
    with pytest.raises(UserError, match=r"--fpr 0.01 needs at least 99 real images; all images has 98"):
        fit(rows_of(logits[1:], np.zeros(98, int)), 0.01)


def test_scores_the_wrong_way_around_are_refused():
    logits, label = drawn(np.random.default_rng(0))
    with pytest.raises(UserError, match="real images score higher than AI"):
        fit(rows_of(-logits, label), 0.05)


def test_groups_are_never_on_both_sides_of_the_held_out_check():
    # Ten groups of images that are equal: held-out folds see none of theirs.
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 10)
    logits = rng.normal(0, 3, 40)[group] + np.where(group % 2, 1.0, -1)
    found = fit(rows_of(logits, group % 2, group=group.astype(str).astype(object)), 0.1)
    hits = found.facts["held_out"]["rates"]["all images"]["fpr"]["hits"]
    assert hits % 10 == 0


def test_the_command_writes_a_calibrator_that_says_what_it_was_fitted_on(tmp_path, capsys):
    logits, label = drawn(np.random.default_rng(0))
    path = write_run(tmp_path, "val", logits, label, is_distorted=(np.arange(400) // 2 % 2).tolist())
    out = tmp_path / "calibrator.json"
    calibrate(["--predictions", path, "--fpr", "0.05", "--by", "is_distorted", "--out", str(out)])
    found = Calibrator.load(out)
    np.testing.assert_allclose(found.facts["thresholds"]["real"]["is_distorted 0"]["n"], 100)
    assert found.data[0]["predictions"] == "val.csv" and found.made_for["experts"] == {"a": "0" * 64}
    assert found.by == ["is_distorted"] and found.promise() in capsys.readouterr().out


def test_a_new_place_moves_the_threshold_for_ai_and_keeps_the_one_for_real(tmp_path, capsys):
    rng = np.random.default_rng(0)
    logits, label = drawn(rng, apart=0.5)
    here = write_run(tmp_path, "val", logits, label)
    there = write_run(tmp_path, "there", rng.normal(0, 1, 200), np.full(200, -1))
    out = str(tmp_path / "calibrator.json")
    calibrate(["--predictions", here, "--fpr", "0.05", "--without-labels", there, "--out", out])
    found, new = Calibrator.load(out), read_rows([], None, [there])
    assert found.ai_threshold == upper_threshold(new.logits, 0.05)
    assert found.real_threshold == lower_threshold(read_rows([here], None).logits[label == 1], 0.05)
    assert "All images of there.csv are real, and AI" in found.facts["assumes"]
    calibrate(["--without-labels", there, "--fpr", "0.05", "--out", out])
    alone = Calibrator.load(out)
    assert alone.ai_threshold == found.ai_threshold and alone.real_threshold is None
    assert "Assumption: All images of there.csv are real." in capsys.readouterr().out


def test_what_cannot_be_calibrated_is_refused_in_one_line(tmp_path):
    logits, label = drawn(np.random.default_rng(0))
    path = write_run(tmp_path, "val", logits, label)
    other = write_run(tmp_path, "other", logits, label, expert="1" * 64)
    ai = write_run(tmp_path, "ai", logits[label == 1], np.ones(200))
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    out = ["--fpr", "0.05", "--out", str(tmp_path / "c.json")]
    for arguments, message in (
        (out, "pass labeled --predictions"),
        (["--predictions", path, other, *out], "different ensembles: experts.a was"),
        (["--predictions", path, path, *out], "named twice"),
        (["--predictions", ai, *out], "no real images"),
        (["--without-labels", path, "--fnr", "0.1", *out], "--fnr is a promise about AI"),
        (["--predictions", path, "--by", "sources", *out], "did you mean source"),
        (["--without-labels", path, "--by", "source", *out], "--by needs the labels"),
        (
            ["--predictions", path, "--fpr", "0.001", *out[2:]],
            "needs at least 999 real images; all images has 200",
        ),
        (["--predictions", path, *out[:2], "--out", str(tmp_path / "notes.json")], "was not written by this"),
    ):
        with pytest.raises(UserError, match=message):
            calibrate(arguments)
    assert not (tmp_path / "c.json").exists() and (tmp_path / "notes.json").read_text() == '{"mine": 1}'
