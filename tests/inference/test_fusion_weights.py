"""Weights in proportion to the robust AUC: against a few lines of NumPy, as a file, and what is refused."""

import json

import numpy as np
import pytest

from featdistill.__main__ import main
from featdistill.command_line import UserError
from featdistill.inference.fusion import Fusion, parse_fusion, probabilities
from featdistill.inference.fusion_fit import Labeled
from featdistill.inference.fusion_weights import by_robust_auc
from featdistill.records.manifest import make_manifest, write_manifest
from featdistill.records.predictions import manifest_entry, write_predictions

NAMES = ["clip", "dino", "siglip"]


def pairs_auc(label, score):
    """The share of pairs of an AI-generated and a real image that are in the right order."""
    differences = score[label == 1][:, None] - score[label == 0]
    return float(np.mean((differences > 0) + (differences == 0) / 2))


def made_rows(count=300, seed=3):
    rng = np.random.default_rng(seed)
    label, is_distorted = rng.integers(0, 2, count), rng.integers(-1, 2, count)
    noise = np.array([1.0, 3.0, 9.0])[:, None] * (1 + is_distorted.clip(0))
    logits = (2 * label - 1 + noise * rng.normal(size=(3, count))) / 5
    return Labeled(NAMES, logits, label, np.array([f"{row}" for row in range(count)], object), is_distorted)


@pytest.mark.parametrize("method", ["logit_mean", "probability_mean"])
def test_weights_are_in_proportion_to_the_auc_of_the_distorted_images(method):
    rows = made_rows()
    fusion = by_robust_auc(rows, method)
    distorted = rows.is_distorted == 1
    aucs = np.array([pairs_auc(rows.label[distorted], logits[distorted]) for logits in rows.logits])
    assert aucs[0] > aucs[1] + 0.05 and aucs[1] > aucs[2] + 0.05
    assert list(fusion.weights) == NAMES and fusion.method == method and fusion.temperature is None
    np.testing.assert_allclose(list(fusion.weights.values()), aucs / aucs.sum(), rtol=1e-12)
    # What is not known to be distorted does not count.
    for mask in (distorted, rows.is_distorted != 0):
        assert by_robust_auc(rows.rows(mask), method) == fusion


def test_the_file_is_a_fusion_with_its_sources(tmp_path, capsys):
    rows = made_rows()
    names = [f"{row:04d}.jpg" for row in range(len(rows.label))]
    distorted = [None if value < 0 else int(value) for value in rows.is_distorted]
    columns = {"image": names, "name": names, "label": rows.label.tolist(), "is_distorted": distorted}
    manifest, path, out = tmp_path / "val_manifest.csv", tmp_path / "val.csv", tmp_path / "fusion.json"
    write_manifest(make_manifest(columns), manifest)
    experts = dict(zip(NAMES, probabilities(rows.logits), strict=True))
    sidecar = {"manifest": manifest_entry(manifest, path), "experts": dict.fromkeys(NAMES, "f" * 64)}
    write_predictions(path, names, np.mean(list(experts.values()), axis=0), experts, sidecar)
    command = ["fuse", "--predictions", str(path), "--out", str(out), "--weights-by", "robust_auc"]
    for flag in ("--folds", "--seed"):
        with pytest.raises(UserError, match="--folds and --seed have an effect with --weights-by fit only"):
            main([*command, flag, "3"])
    main([*command, "--method", "probability_mean"])
    text, content, fusion = capsys.readouterr().out, json.loads(out.read_text()), parse_fusion(str(out))
    expected = by_robust_auc(rows, "probability_mean")
    assert fusion.method == "probability_mean" and fusion.weights == pytest.approx(expected.weights, rel=1e-9)
    assert content["measured_on"]["distorted"] == sum(rows.is_distorted == 1)
    assert content["measured_on"]["files"][0]["predictions"] == "val.csv"
    scores, on = content["scores"], rows.is_distorted == 0
    for name, logits in zip(NAMES, rows.logits, strict=True):
        assert scores[name]["clean_auc"] == pytest.approx(pairs_auc(rows.label[on], logits[on]))
        assert f"{fusion.weights[name]:.3f}" in text
    mean = Fusion("probability_mean").apply(rows.logits, NAMES)
    plain = scores["probability_mean, equal weights"]
    assert plain["auc"] == pytest.approx(pairs_auc(rows.label, mean))
    first = out.read_bytes()
    main([*command, "--method", "probability_mean"])
    assert out.read_bytes() == first


@pytest.mark.parametrize("case", ["none distorted", "one class distorted"])
def test_rows_without_a_robust_auc_are_refused(case):
    rows = made_rows(40)
    keep = rows.is_distorted < 1 if case == "none distorted" else rows.label == 1
    with pytest.raises(UserError, match="needs distorted images of both classes"):
        by_robust_auc(rows.rows(keep))
