"""Mistakes of a run and reported images become rows of one manifest, each once."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_prep import mistakes
from featdistill.calibration import Calibrator
from featdistill.command_line import UserError
from featdistill.records.manifest import make_manifest, read_manifest, write_manifest
from featdistill.records.predictions import manifest_entry, write_predictions

LABEL = [0, 0, 0, 0, 1, 1, 1, None]
SCORE = [0.9, 0.6, 0.95, 0.1, 0.2, 0.01, 0.8, 0.99]


@pytest.fixture
def run(tmp_path):
    names = [f"{number}.jpg" for number in range(8)]
    columns = {"image": names, "name": names, "label": LABEL, "source": ["here"] * 8, "scene": ["night"] * 8}
    write_manifest(make_manifest(columns), tmp_path / "labels.csv")
    path = tmp_path / "val.csv"
    sidecar = {"manifest": manifest_entry(tmp_path / "labels.csv", path)}
    write_predictions(path, names, np.array(SCORE), {}, sidecar)
    return path


def test_the_most_confident_mistakes_of_each_class_keep_their_rows(run, tmp_path):
    out = tmp_path / "regression.csv"
    assert mistakes.main(["--predictions", str(run), "--count", "2", "--out", str(out)]) == 0
    rows = read_manifest(out)
    assert rows["name"].tolist() == ["2.jpg", "0.jpg", "5.jpg", "4.jpg"]
    assert rows["reason"].tolist() == ["real image called AI"] * 2 + ["AI image called real"] * 2
    assert rows["score_then"].tolist() == ["0.95", "0.9", "0.01", "0.2"]
    assert set(rows["scene"]) == {"night"} and rows["image"].iloc[0] == str(tmp_path / "2.jpg")


def test_with_a_calibrator_mistakes_are_wrong_verdicts(run, tmp_path):
    calibrator, out = tmp_path / "c.json", tmp_path / "regression.csv"
    Calibrator(None, 2.5, -2.0, 0.05, 0.05, None, {}, 20, 20).save(calibrator)
    mistakes.main(["--predictions", str(run), "--calibrator", str(calibrator), "--out", str(out)])
    # Above .924 and below .119.
    assert read_manifest(out)["name"].tolist() == ["2.jpg", "5.jpg"]


def test_another_image_of_the_same_name_is_refused_and_nothing_is_lost(run, tmp_path):
    out, other = tmp_path / "regression.csv", tmp_path / "other" / "labels.csv"
    mistakes.main(["--predictions", str(run), "--out", str(out)])
    before = out.read_bytes()
    mistakes.main(["--predictions", str(run), "--out", str(out)])
    assert out.read_bytes() == before
    other.parent.mkdir()
    columns = {name: [f"{number}.jpg" for number in range(8)] for name in ("image", "name")}
    write_manifest(make_manifest({**columns, "label": LABEL}), other)
    with pytest.raises(UserError, match=r"another image of the name 2\.jpg .* and combine both manifests"):
        mistakes.main(["--predictions", str(run), "--labels", str(other), "--out", str(out)])
    assert out.read_bytes() == before


def test_reported_images_are_added_once_and_earlier_rows_stay(run, tmp_path):
    out, reported = tmp_path / "regression.csv", tmp_path / "reported"
    mistakes.main(["--predictions", str(run), "--out", str(out)])
    before = pd.read_csv(out, dtype=str)
    reported.mkdir()
    for name, gray in (("a.png", 10), ("b.png", 20), ("copy_of_a.png", 10)):
        Image.fromarray(np.full((16, 16, 3), gray, np.uint8)).save(reported / name)
    flags = ["--folder", str(reported), "--reason", "dark photos", "--out", str(out)]
    for _ in range(2):
        assert mistakes.main([*flags, "--label", "real"]) == 0
    rows = pd.read_csv(out, dtype=str)
    pd.testing.assert_frame_equal(rows.iloc[: len(before)], before)
    assert rows["reason"].iloc[len(before) :].tolist() == ["dark photos"] * 2
    assert len(read_manifest(out)) == len(before) + 2
    with pytest.raises(UserError, match="has another label"):
        mistakes.main([*flags, "--label", "ai"])


def test_what_is_missing_or_foreign_is_refused(run, tmp_path):
    out = ["--out", str(tmp_path / "labels.csv")]
    for flags, message in (
        ([], "either --predictions FILE or --folder"),
        (["--folder", str(tmp_path)], "needs --label and --reason"),
        (["--predictions", str(run), "--label", "ai"], "are for --folder"),
        (["--predictions", str(run)], "labels.csv has no column reason"),
    ):
        with pytest.raises(UserError, match=message):
            mistakes.main([*flags, *out])
