"""One call from pictures to scores: the same ones however a picture is given, from however many threads."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import smooth_picture
from PIL import Image
from tiny_experts import save_tiny_pair

import featdistill
import predict
from featdistill.calibration import Calibrator
from featdistill.calibration.stability import NEAR_LOGITS, parse_request
from featdistill.command_line import UserError
from featdistill.images.reading import TooManyPixels, decode, from_pillow, read_image
from featdistill.inference.detector import Detector, redelivered
from featdistill.records.predictions import read_predictions


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> list[str]:
    return save_tiny_pair(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def detector(experts) -> Detector:
    return featdistill.Detector.load(*experts, device="cpu", batch_size=1, tta="hflip+blur")


@pytest.fixture
def paths(make_set) -> list[str]:
    return sorted(str(path) for path in make_set("pictures", 6).parent.glob("*.jpg"))


def test_path_bytes_picture_and_array_have_one_score_which_is_that_of_predict(
    detector, experts, paths, tmp_path, capsys
):
    path = paths[0]
    with open(path, "rb") as file, Image.open(path) as image:
        data = file.read()
        rows = [detector(picture) for picture in (path, data, image, decode(data))]
        buffers = [bytearray(data), memoryview(data), io.BytesIO(data)]
    scores = {(row.score, row.logit, *row.experts.values()) for row in [*rows, *map(detector, buffers)]}
    assert len(scores) == 1 and [row.name for row in rows] == [path, "image 1", "image 1", "image 1"]
    settings = ["--experts", *experts, "--device", "cpu", "--batch-size", "1", "--tta", "hflip+blur"]
    predict.main([path, *settings, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["images"] == [rows[0].as_dict()] and printed["batch_size"] == 1
    predict.main([*paths, *settings, "--workers", "0", "--out", str(tmp_path / "scores.csv")])
    expected = read_predictions(tmp_path / "scores.csv")
    found = detector(paths)
    assert [row.score for row in found] == expected["score"].tolist()
    assert [row.experts["beta"] for row in found] == expected["beta"].tolist()
    assert rows[0].score == pytest.approx(1 / (1 + np.exp(-rows[0].logit)), abs=1e-15)


def test_a_prepared_picture_has_the_scores_of_its_file_and_its_pixels_are_limited(detector, paths):
    files = [Path(path).read_bytes() for path in paths]
    assert detector([detector.prepare(data) for data in files]) == detector(files)
    with pytest.raises(TooManyPixels, match="88 x 72 pixels are more than the limit of 6335"):
        detector.prepare(files[0], max_pixels=88 * 72 - 1)
    assert detector(detector.prepare(files[0], max_pixels=88 * 72)) == detector(files[0])


def test_eight_threads_get_what_one_gets(detector, paths, tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for path in paths:
            archive.write(path, path.rpartition("/")[2])
    images = [Image.open(path) for path in paths]  # not decoded yet, and shared by the threads
    members = [f"{tmp_path}/pictures.zip::{path.rpartition('/')[2]}" for path in paths]
    expected = [row.score for row in detector(paths)]
    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(detector, pictures) for pictures in (paths, images, members) * 4]
        for call in calls:
            assert [row.score for row in call.result()] == expected


def test_what_cannot_be_read_has_a_row_that_says_so_and_changes_no_other(detector, paths):
    broken = ["gone.jpg", b"no image", np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), None]
    rows = detector([paths[0], *broken, paths[1]])
    assert [row.score for row in (rows[0], rows[-1])] == [detector(path).score for path in paths[:2]]
    reasons = [
        "FileNotFoundError",
        "cannot identify",
        r"(4, 4) uint8",
        "(4, 4, 3) float64",
        "NoneType is not a picture",
    ]
    for row, reason in zip(rows[1:-1], reasons, strict=True):
        assert (
            reason in row.error
            and row.score is row.logit is None
            and list(row.as_dict()) == ["name", "error"]
        )
    assert rows[2].name == "image 3" and detector([]) == [] and isinstance(detector(iter(paths)), list)
    closed = Image.open(paths[0])
    closed.close()
    assert detector(closed).error and detector(None).error == "NoneType is not a picture"


def test_a_pillow_image_is_read_like_its_file_and_not_changed(tmp_path):
    pixels, path = smooth_picture(0, 40, 56), tmp_path / "image"
    turned = Image.Exif()
    turned[0x0112] = 6
    rgba = np.dstack([pixels, np.full(pixels.shape[:2], 90, np.uint8)])
    palette = Image.fromarray(pixels).quantize(40)
    pictures = {
        "turned.jpg": (Image.fromarray(pixels), {"exif": turned}),
        "turned.png": (Image.fromarray(pixels), {"exif": turned}),
        "gray.png": (Image.fromarray(pixels[..., 0]), {}),
        "deep.png": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 200), {}),
        "alpha.png": (Image.fromarray(rgba), {}),
        "palette.png": (palette, {"transparency": bytes(range(40))}),
        "palette.gif": (palette, {"transparency": 3}),
        "color.png": (Image.fromarray(pixels), {"transparency": tuple(pixels[0, 0].tolist())}),
        "cmyk.jpg": (Image.fromarray(pixels).convert("CMYK"), {}),
        "white.tif": (Image.fromarray(pixels[..., 0]), {"tiffinfo": {0x0106: 0}}),
    }
    for name, (picture, options) in pictures.items():
        path = tmp_path / name
        picture.save(path, **options)
        with Image.open(path) as image:
            info = dict(image.info)
            assert np.array_equal(from_pillow(image), read_image(str(path))), name
            assert image.info == info and image.mode == Image.open(path).mode, name


@pytest.fixture(scope="module")
def calibrator(detector, tmp_path_factory) -> Calibrator:
    """Thresholds around which the pictures of the tests lie."""
    logits = sorted(detector(smooth_picture(seed)).logit for seed in range(6))
    low, high = float(np.mean(logits[1:3])), float(np.mean(logits[3:5]))
    made_for = detector.predictor.sidecar()
    made_for = {name: made_for[name] for name in ("experts", "preprocessing", "fusion", "tta")}
    parameters = {"slope": 2.0, "intercept": -high}
    made = Calibrator(made_for, high, low, 0.05, 0.1, "platt", parameters, 100, 100)
    made.save(tmp_path_factory.mktemp("calibrated") / "calibrator.json")
    return made


def test_verdicts_are_the_calibrators_and_only_there_with_one(detector, calibrator, paths, experts):
    judge = Detector(detector.predictor, calibrator)
    pictures = [smooth_picture(seed) for seed in range(6)]
    rows, plain = judge(pictures), detector(pictures)
    assert sorted(row.verdict for row in rows) == ["AI", "AI", "real", "real", "unsure", "unsure"]
    for row, without in zip(rows, plain, strict=True):
        assert (row.score, row.experts) == (without.score, without.experts) and without.verdict is None
        assert row.verdict == calibrator.verdicts(np.array([row.logit]))[0]
        assert row.probability == calibrator.probability(np.array([row.logit]))[0]
        assert row.thresholds == {"real": calibrator.real_threshold, "AI": calibrator.ai_threshold}
        assert row.promise == calibrator.promise() and "verdict" not in without.as_dict()
    with pytest.raises(UserError, match="fitted for other scores"):
        Detector.load(experts[0], device="cpu", calibrator=calibrator)


def test_copies_are_drawn_from_the_name_and_give_mean_spread_and_flips(detector, calibrator):
    judge = Detector(detector.predictor, calibrator, parse_request("4"))
    picture = smooth_picture(2)
    row = judge.rows([picture], ["a.jpg"])[0]
    copies = [detector(redelivered(picture, f"a.jpg#{number}")) for number in range(1, 5)]
    scores = np.array([copy.score for copy in copies])
    verdicts = calibrator.verdicts(np.array([copy.logit for copy in copies]))
    assert row.stability.copies == 4 and row.score == detector(picture).score
    assert row.stability.mean == pytest.approx(scores.mean(), abs=1e-6)
    assert row.stability.spread == pytest.approx(scores.std(), abs=1e-6)
    assert row.stability.flips == np.mean(verdicts != row.verdict)
    assert judge.rows([picture], ["b.jpg"])[0].stability != row.stability
    assert judge(np.zeros((9, 40, 3), np.uint8)).stability is None
    near = Detector(
        detector.predictor, dataclasses.replace(calibrator, ai_threshold=50.0), parse_request("near:3")
    )
    known = {seed: near(smooth_picture(seed)) for seed in range(6)}
    for row in known.values():
        is_near = abs(row.logit - calibrator.real_threshold) <= NEAR_LOGITS
        assert (row.stability is not None) == is_near and (not is_near or row.stability.copies == 3)
    with pytest.raises(UserError, match="near needs --calibrator"):
        Detector(detector.predictor, None, parse_request("near"))


def test_files_of_predictions_get_verdicts_and_stability_and_are_continued(
    detector, calibrator, experts, paths, tmp_path, capsys, caplog
):
    calibrator.save(tmp_path / "calibrator.json")
    settings = ["--experts", *experts, "--device", "cpu", "--batch-size", "1", "--tta", "hflip+blur"]
    verdicts = ["--calibrator", str(tmp_path / "calibrator.json"), "--stability", "3"]
    command = [*paths[:3], *settings, "--workers", "0", "--out", str(tmp_path / "scores.csv")]
    (tmp_path / "scores.verdicts.csv").write_text("mine")
    with pytest.raises(UserError, match="was not written by this command"):
        predict.main([*command, *verdicts])
    assert not (tmp_path / "scores.csv").exists()
    (tmp_path / "scores.verdicts.csv").unlink()
    predict.main([*command, *verdicts])
    found = pd.read_csv(tmp_path / "scores.verdicts.csv")
    rows = Detector(detector.predictor, calibrator, parse_request("3"))(paths[:3])
    assert list(found)[:4] == ["name", "score", "probability", "verdict"]
    for (_, line), row in zip(found.iterrows(), rows, strict=True):
        assert (line["name"], line["score"], line["verdict"]) == (row.name, row.score, row.verdict)
        assert (line["mean"], line["flips"]) == pytest.approx(
            (row.stability.mean, row.stability.flips), abs=1e-6
        )
        assert line["copies"] == 3 and line["probability"] == row.probability
    assert list(read_predictions(tmp_path / "scores.csv")) == ["name", "score", "alpha", "beta"]
    assert "At most 5 % of real images" in caplog.text and "the re-delivered copies of" in caplog.text
    written = {path.name: path.read_bytes() for path in tmp_path.glob("scores*")}
    assert {"scores.copies.csv", "scores.verdicts.csv.json"} <= set(written)
    predict.main([*command, *verdicts])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("scores*")} == written
    with pytest.raises(UserError, match=r"scores\.verdicts\.csv was produced with different settings"):
        predict.main([*command, *verdicts[:2]])
    capsys.readouterr()
    predict.main([paths[0], *settings, *verdicts, "--json"])
    assert json.loads(capsys.readouterr().out)["images"][0]["verdict"] == rows[0].verdict
    predict.main([paths[0], "gone.jpg", *settings, *verdicts])
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["image", "verdict", "P(AI)", "alpha", "beta", "mean", "spread", "flips"]
    assert table[1].split()[1] == rows[0].verdict and table[1].endswith("%") and "gone.jpg" in table[2]
    assert any(line.startswith("Verdicts: At most 5 %") for line in table)


def test_settings_are_those_of_the_ensemble(experts, paths, detector):
    with pytest.raises(UserError, match="no experts are given"):
        Detector.load()
    weighted = Detector.load(*experts, device="cpu", weights="alpha=1,beta=0")
    assert weighted.batch_size == 32 and weighted(paths[0]).score == weighted(paths[0]).experts["alpha"]
    made_by = detector.describe()
    assert made_by["tta"] == "hflip+blur" and list(made_by["experts"]) == ["alpha", "beta"]


def test_the_package_itself_stays_light():
    script = "import sys, featdistill; assert 'Detector' in dir(featdistill); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_example_of_the_readme_runs(experts, paths, tmp_path, capsys, monkeypatch):
    text = (Path(predict.__file__).parent / "README.md").read_text(encoding="utf-8")
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Detector" in code]
    assert len(example.splitlines()) <= 10
    folder = tmp_path / re.search(r'"(runs/\S+)"', example)[1]
    folder.parent.mkdir(parents=True)
    shutil.copytree(experts[0], folder)
    for name in re.findall(r'"(\w+\.jpg)"', example):
        shutil.copy(paths[0], tmp_path / name)
    calibrator = Calibrator(None, 40.0, 30.0, 0.05, 0.1, None, {}, 100, 100)
    calibrator.save(tmp_path / "calibrator.json")
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert "other.jpg ('real', 0." in capsys.readouterr().out
