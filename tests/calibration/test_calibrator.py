"""The calibrator: verdicts, probabilities, what it promises, and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from featdistill.calibration import Calibrator
from featdistill.command_line import UserError

SIDECAR = {
    "experts": {"a": "0" * 64},
    "preprocessing": {"a": {"size": 224}},
    "fusion": "probability_mean",
    "tta": "none",
    "precision": "bf16",
}
PLATT = Calibrator(
    made_for={name: SIDECAR[name] for name in ("experts", "preprocessing", "fusion", "tta")},
    ai_threshold=2.0,
    real_threshold=-1.0,
    fpr=0.05,
    fnr=0.1,
    method="platt",
    parameters={"slope": 0.5, "intercept": -1.0},
    real=300,
    ai=200,
)
ISOTONIC = replace(
    PLATT, method="isotonic", parameters={"logits": [-2.0, 0.0, 3.0], "probabilities": [0.1, 0.4, 0.9]}
)
REAL_ONLY = replace(PLATT, real_threshold=None, fnr=None, method=None, parameters={}, ai=0)


def test_verdicts_are_those_of_the_thresholds_and_on_a_threshold_it_is_unsure():
    logits = np.array([-3, -1.001, -1, 0, 2, 2.001, np.inf])
    expected = ["real", "real", "unsure", "unsure", "unsure", "AI", "AI"]
    assert PLATT.verdicts(logits).tolist() == expected
    assert REAL_ONLY.verdicts(logits).tolist() == ["unsure"] * 5 + ["AI", "AI"]
    assert PLATT.verdicts(np.array([])).shape == (0,)
    with pytest.raises(ValueError, match="NaN"):
        PLATT.verdicts(np.array([np.nan]))


def test_without_an_unsure_zone_one_threshold_decides():
    calibrator = replace(PLATT, real_threshold=2.0)
    assert calibrator.verdicts(np.array([1.9, 2.1])).tolist() == ["real", "AI"]


def test_probabilities_are_those_of_the_method():
    logits = np.array([-4.0, -1, 0, 1.5, 9])
    np.testing.assert_allclose(PLATT.probability(logits), expit(0.5 * logits - 1), rtol=1e-12)
    np.testing.assert_allclose(ISOTONIC.probability(logits), [0.1, 0.25, 0.4, 0.65, 0.9], rtol=1e-12)
    np.testing.assert_allclose(REAL_ONLY.probability(logits), expit(logits), rtol=1e-12)


@pytest.mark.parametrize("calibrator", [PLATT, ISOTONIC, REAL_ONLY, replace(PLATT, by=["source"])])
def test_a_calibrator_comes_back_from_its_file(tmp_path, calibrator):
    calibrator.save(tmp_path / "calibrator.json")
    assert Calibrator.load(tmp_path / "calibrator.json") == calibrator
    assert [path.name for path in tmp_path.iterdir()] == ["calibrator.json"]


def test_the_promise_is_one_sentence():
    real = "At most 5 % of real images like those it was calibrated on are called AI"
    assert REAL_ONLY.promise() == f"{real}."
    assert PLATT.promise() == f"{real}, and at most 10 % of such AI-generated images real."
    assert replace(REAL_ONLY, fpr=0.001).promise().startswith("At most 0.1 % of real")
    by = replace(REAL_ONLY, by=["source", "is_distorted"])
    assert by.promise() == f"{real}, in each group by source and is_distorted."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "fusion"}, "has format 'fusion'; this version reads format 'featdistill calibrator'"),
        ({"version": 2}, "has version 2; this version reads version 1; fit one"),
        ({"ai_threshold": None}, "damaged"),
        ({"ai_threshold": "2"}, "damaged"),
        ({"real_threshold": 2.5}, "damaged: the thresholds"),
        ({"real_threshold": None}, "damaged: fnr and real_threshold"),
        ({"fpr": 0}, "damaged: fpr is 0"),
        ({"fnr": "x"}, "damaged"),
        ({"method": "beta"}, "damaged: unknown method beta"),
        ({"parameters": {"slope": -1, "intercept": 0}}, "damaged: platt needs a slope"),
        ({"parameters": {}}, "damaged: 'slope' is missing"),
        ({"parameters": []}, "damaged"),
        ({"method": "isotonic", "parameters": {"logits": [1], "probabilities": [0, 1]}}, "damaged"),
        ({"method": "isotonic", "parameters": {"logits": [1, 0], "probabilities": [0, 1]}}, "damaged.*rise"),
        ({"method": "isotonic", "parameters": {"logits": [0, 1], "probabilities": [0, 2]}}, "damaged"),
        ({"method": "isotonic", "parameters": {"logits": [], "probabilities": []}}, "damaged"),
        ({"real": ...}, "damaged: 'real' is missing"),
    ],
)
def test_a_file_that_is_foreign_or_damaged_is_refused_in_one_line(tmp_path, changes, message):
    path = tmp_path / "calibrator.json"
    PLATT.save(path)
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))
    with pytest.raises(UserError, match=message) as error:
        Calibrator.load(path)
    assert "calibrate" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_missing_or_not_json_is_refused(tmp_path):
    path = tmp_path / "calibrator.json"
    with pytest.raises(UserError, match="does not exist"):
        Calibrator.load(path)
    path.write_text('{"format": ')
    with pytest.raises(UserError, match="not readable JSON"):
        Calibrator.load(path)


def test_scores_of_other_experts_are_refused_and_of_another_precision_accepted():
    PLATT.check(SIDECAR | {"precision": "fp32"}, "here")
    PLATT.check(None, "here")
    replace(PLATT, made_for=None).check(SIDECAR, "here")
    renamed = {key: {"b": SIDECAR[key]["a"]} for key in ("experts", "preprocessing")}
    PLATT.check(SIDECAR | renamed, "here")
    for changes, message in (
        ({"experts": {"a": "1" * 64}}, 'val.csv: experts.a was "0{12}...", is "1{12}'),
        (renamed | {"experts": {"b": "1" * 64}}, 'val.csv: experts.b was "0{12}...", is "1{12}'),
        ({"experts": {"a": "0" * 64, "b": "1" * 64}}, "experts.b was absent"),
        ({"fusion": "logit_mean"}, "fusion was"),
        ({"tta": "flip"}, "tta was"),
        ({"preprocessing": {"a": {"size": 336}}}, "preprocessing.a.size was 224, is 336"),
    ):
        with pytest.raises(UserError, match=message):
            PLATT.check(SIDECAR | changes, "val.csv")
