"""What `evaluate.py --calibrator` says of the promise: figures, words, tables and the report."""

import json

import numpy as np
import pytest
from report_inputs import make_split, read_page
from sklearn.metrics import log_loss

import evaluate
from featdistill.calibration import Calibrator
from featdistill.calibration.check import sentences
from featdistill.calibration.rates import verdict_rates
from featdistill.calibration.stability import copy_names
from featdistill.command_line import UserError
from featdistill.evaluation.splits import load_splits
from featdistill.records.logits import logits_of
from featdistill.records.predictions import read_sidecar, write_predictions

CALIBRATOR = Calibrator(
    None, 1.0, -2.0, 0.05, 0.1, "platt", {"slope": 0.5, "intercept": 0.2}, 100, 100, ["is_distorted"]
)


def test_figures_are_in_metrics_tables_and_report(tmp_path, capsys):
    path = make_split(tmp_path, "val", changes={"source": ["here", "there"] * 80})
    CALIBRATOR.save(tmp_path / "c.json")
    flags = ["--calibrator", str(tmp_path / "c.json"), "--gallery", "0", "--out", str(tmp_path / "out")]
    assert evaluate.main(["--predictions", str(path), *flags]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["splits"]["val"]["verdicts"]
    frame = load_splits([str(path)])[0].frame
    label, score = frame["label"].to_numpy(), frame["score"].to_numpy()
    logits = logits_of(score)
    assert found["fpr"]["rate"] == (logits[label == 0] > 1).mean()
    assert found["fnr"]["rate"] == (logits[label == 1] < -2).mean()
    decided = (logits > 1) | (logits < -2)
    assert found["coverage"] == decided.mean() == 1 - found["unsure"]["rate"]
    assert found["decided_right"] == ((logits > 1) == (label == 1))[decided].mean()
    np.testing.assert_allclose(found["before"]["log_loss"], log_loss(label, score))
    after = log_loss(label, CALIBRATOR.probability(logits))
    np.testing.assert_allclose(found["after"]["log_loss"], after)
    assert {name: set(groups) for name, groups in found["groups"].items()} == {
        "is_distorted": {"clean", "distorted"},
        "source": {"here", "there"},
    }
    by_state = found["groups"]["is_distorted"]
    assert sum(rates["fpr"]["hits"] for rates in by_state.values()) == found["fpr"]["hits"]
    text = capsys.readouterr().out
    assert CALIBRATOR.promise() in text and found["sentences"][0] in text
    assert (
        f"verdicts/source/here/fpr,{by_state and found['groups']['source']['here']['fpr']['rate']}"
        in (tmp_path / "out" / "metrics.csv").read_text()
    )
    page = read_page(tmp_path / "out" / "report.html").text()
    assert CALIBRATOR.promise() in page and found["sentences"][1] in page


def test_flips_of_copies_are_reported_where_there_are_copies(tmp_path, capsys):
    path = make_split(tmp_path, "val")
    CALIBRATOR.save(tmp_path / "c.json")
    frame = load_splits([str(path)])[0].frame
    names = [copy for name in frame["name"] for copy in copy_names(name, 2)]
    # The first copy scores like its image, the second in between the thresholds.
    score = np.stack([frame["score"].to_numpy(), np.full(len(frame), 0.4)], axis=1).ravel()
    write_predictions(path.with_name("val.copies.csv"), names, score, {}, {})
    flags = ["--calibrator", str(tmp_path / "c.json"), "--no-report", "--out", str(tmp_path / "out")]
    assert evaluate.main(["--predictions", str(path), *flags]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["splits"]["val"]["verdicts"]
    assert found["flips"]["flips"]["rate"] == 0.5 and found["flips"]["reversals"]["rate"] == 0
    assert found["flips"]["flips"]["n"] == round(found["coverage"] * len(frame)) > 0
    assert "50.0 % [50.0, 50.0] get another verdict, 0.0 % the opposite one" in capsys.readouterr().out
    assert "val,verdicts/flips,0.5,0.5,0.5," in (tmp_path / "out" / "metrics.csv").read_text()


def test_the_sentence_says_whether_the_promise_fails_holds_or_is_within_chance():
    label = np.zeros(1000, int)
    for called, start in (
        (100, "The promise fails here: 10.0 % of 1,000 real images are called AI (95 %: 8.2"),
        (20, "The promise holds here: 2.0 %"),
        (50, "Within chance of the promise: 5.0 %"),
    ):
        verdicts = np.where(np.arange(1000) < called, "AI", "unsure")
        (text,) = sentences(verdict_rates(label, verdicts), CALIBRATOR)
        assert text.startswith(start) and "5 % was promised" in text
    assert sentences(verdict_rates(label[:0], np.array([])), CALIBRATOR) == []


def test_scores_of_other_experts_are_refused(tmp_path):
    path = make_split(tmp_path, "val", 40)
    sidecar = read_sidecar(path)
    made_for = {name: sidecar[name] for name in ("experts", "preprocessing", "fusion")} | {"tta": "none"}
    made_for["experts"] |= {"clip_l14_a": "f" * 64}
    Calibrator(made_for, 1.0, None, 0.05, None, None, {}, 100, 0).save(tmp_path / "c.json")
    flags = ["--calibrator", str(tmp_path / "c.json"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"other scores than those of .*val.csv: experts.clip_l14_a was"):
        evaluate.main(["--predictions", str(path), *flags])
