"""One call from pictures to scores: the same ones however a picture is given, from however many threads."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image

import featdistill
import predict
from featdistill.command_line import UserError
from featdistill.images.reading import decode, from_pillow, read_image
from featdistill.inference.detector import Detector
from featdistill.models.expert import create_expert, save_expert
from featdistill.records.predictions import read_predictions


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("experts")
    for seed, (name, backbone, size) in enumerate([("alpha", "tiny_clip", 48), ("beta", "tiny_siglip", 32)]):
        torch.manual_seed(seed)
        expert = create_expert(backbone, "random", input_size=size, head_hidden=8)
        with torch.no_grad():
            expert.head[3].weight.mul_(40)
        save_expert(expert.eval(), root / name / "expert")
    return [str(root / name / "expert") for name in ("alpha", "beta")]


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
    scores = {(row.score, row.logit, *row.experts.values()) for row in rows}
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


def test_eight_threads_get_what_one_gets(detector, paths, tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for path in paths:
            archive.write(path, path.rpartition("/")[2])
    images = [Image.open(path) for path in paths]  # not decoded yet, and shared by the threads
    members = [f"{tmp_path}/pictures.zip::{path.rpartition('/')[2]}" for path in paths]
    expected = [row.score for row in detector(paths)]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            calls = [threads.submit(detector, pictures) for pictures in (paths, images, members) * 6]
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
        "a NoneType is not",
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
    assert detector(closed).error


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
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert "photo.jpg" in capsys.readouterr().out
