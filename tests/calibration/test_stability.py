"""Re-delivered copies: what is requested, what became of scores and verdicts, and the files about them."""

import numpy as np
import pytest

from featdistill.calibration import Calibrator
from featdistill.calibration.stability import (
    Request,
    flip_rates,
    flip_sentence,
    is_near,
    parse_request,
    stability_of,
)
from featdistill.calibration.verdict_files import read_copies, write_verdicts
from featdistill.command_line import UserError
from featdistill.records.logits import probabilities
from featdistill.records.predictions import parse_csv, write_predictions

# AI above a logit of 2, real below -1.
CALIBRATOR = Calibrator(None, 2.0, -1.0, 0.05, 0.1, None, {}, 100, 100)


def scores(*logits: float) -> np.ndarray:
    return probabilities(np.array(logits, np.float64))


def test_a_request_is_a_number_of_copies_near_or_both():
    assert parse_request("12") == Request(12, False) and parse_request("near") == Request(20, True)
    assert parse_request("near:5") == Request(5, True)
    for text in ("1", "0", "-3", "1001", "often", "near:", "near:1", "12:near", "3.5", ""):
        with pytest.raises(UserError, match="a number of copies from 2 to 1000, near, or near:N"):
            parse_request(text)


def test_near_is_within_two_logits_of_a_threshold():
    logits = np.array([-3.1, -2.9, 0.5, 3.9, 4.1])
    assert is_near(logits, CALIBRATOR).tolist() == [False, True, True, True, False]
    without_real = Calibrator(None, 2.0, None, 0.05, None, None, {}, 100, 0)
    assert is_near(logits, without_real).tolist() == [False, False, True, True, False]


def test_flips_are_other_verdicts_and_reversals_the_opposite_ones():
    one = stability_of(scores(3)[0], scores(3, 4, 0, -2), CALIBRATOR)
    assert (one.copies, one.flips, one.reversals) == (4, 0.5, 0.25)
    assert one.mean == scores(3, 4, 0, -2).mean() and one.spread == scores(3, 4, 0, -2).std()
    assert one.sentence().endswith("The verdict changes in 2 of them, to the opposite in 1.")
    unsure = stability_of(0.5, scores(3, 0, -2), CALIBRATOR)
    assert (unsure.flips, unsure.reversals) == (2 / 3, 0) and stability_of(0.5, scores(1, 1)).flips is None
    same = stability_of(scores(3)[0], scores(3, 4), CALIBRATOR)
    assert same.sentence().endswith("The verdict stays the same in all of them.")


def test_flip_rates_are_those_of_decided_images():
    images, copies = scores(3, 0, -5), [scores(3, 0), scores(9, 9), scores(-2, -2)]
    rates = flip_rates(images, copies, CALIBRATOR)
    assert rates["flips"]["rate"] == 0.25 and rates["flips"]["n"] == 2 and rates["reversals"]["rate"] == 0
    assert rates["flips"]["low"] == 0 and rates["flips"]["high"] == pytest.approx(0.25 + 1.96 * 0.25 / 2**0.5)
    assert "of 2 decided images, 25.0 % [0.0, 59.6] get another verdict, 0.0 %" in flip_sentence(rates, False)
    assert "of 2 decided images near a threshold, 25.0 %" in flip_sentence(rates, True)
    assert "no verdict can flip" in flip_sentence(flip_rates(images[1:2], copies[1:2], CALIBRATOR), False)


def test_verdicts_are_written_next_to_the_scores_and_never_over_others(tmp_path):
    path, names = tmp_path / "a.csv", ["x.jpg", "y#1.jpg", "z.jpg"]
    write_predictions(path, names, scores(3, 0, -5), {}, {"experts": {}})
    copies = {"x.jpg#1": 3, "x.jpg#2": 0, "y#1.jpg#1": 1, "y#1.jpg#2": 1}
    write_predictions(tmp_path / "a.copies.csv", [*copies], scores(*copies.values()), {}, {"experts": {}})
    found = read_copies(path)
    assert [*found] == ["x.jpg", "y#1.jpg"] and np.array_equal(found["x.jpg"], scores(3, 0))
    stability = {name: stability_of(0.5, own, CALIBRATOR) for name, own in found.items()}
    out = write_verdicts(path, CALIBRATOR, stability, {"copies": 2})
    header, rows = parse_csv(out.read_bytes(), "")
    assert header == [
        "name",
        "score",
        "probability",
        "verdict",
        "copies",
        "mean",
        "spread",
        "flips",
        "reversals",
    ]
    assert [row[3] for row in rows] == ["AI", "unsure", "real"] and rows[2][4:] == [""] * 5
    assert [float(row[1]) for row in rows] == scores(3, 0, -5).tolist() and rows[0][4] == "2"
    before = out.read_bytes()
    assert write_verdicts(path, CALIBRATOR, stability, {"copies": 2}) == out and out.read_bytes() == before
    with pytest.raises(UserError, match=r"produced with different settings: .*; remove it"):
        write_verdicts(path, CALIBRATOR)
    out.unlink()
    assert parse_csv(write_verdicts(path, None).read_bytes(), "")[0] == ["name", "score"]
    (tmp_path / "b.verdicts.csv").write_text("mine")
    write_predictions(tmp_path / "b.csv", ["x"], scores(3), {}, {"experts": {}})
    with pytest.raises(UserError, match="was not written by this command; remove it"):
        write_verdicts(tmp_path / "b.csv", CALIBRATOR)
