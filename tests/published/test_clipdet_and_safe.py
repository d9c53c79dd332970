"""ClipDet and SAFE: pixels, front end and logits as the authors' code gives them, and their use."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from published_files import (
    CLIP,
    accept_random_weights,
    clipdet,
    published_pixels,
    resized_band,
    safe,
    wavelet_band,
)

import evaluate
import predict
from featdistill import Detector, __main__
from featdistill.command_line import UserError
from featdistill.data.preprocessing import prepare
from featdistill.models.expert import create_expert, save_expert
from featdistill.published import loading
from featdistill.published.safe import diagonal_detail

# Sides (height, width): smaller and larger than the inputs, odd and even.
SIDES = [(72, 88), (97, 301), (224, 224), (257, 440), (301, 600), (601, 450)]


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    noise = [rng.integers(-20, 20, (*sides, 3)) for sides in SIDES]
    smooth = [smooth_picture(seed, *sides) for seed, sides in enumerate(SIDES)]
    return [(one + other).clip(0, 255).astype(np.uint8) for one, other in zip(smooth, noise, strict=True)]


def scores_of(reference: str, pictures: list[np.ndarray]) -> torch.Tensor:
    detector = Detector.load(reference, device="cpu", precision="fp32")
    return torch.tensor([row.logit for row in detector(pictures)], dtype=torch.float32)


def test_bicubic_pixels_are_torchvision_s_to_the_last_bit(pictures):
    for picture in pictures:
        expected = published_pixels([picture], 224, 224, ((0,) * 3, (1,) * 3), bicubic=True)[0]
        assert torch.equal(prepare(picture, 224, "bicubic:224").float(), (255 * expected).round())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_clipdet_scores_as_published(monkeypatch, tmp_path, pictures, prefix):
    name, paths = "clipdet_latent10k_plus", [tmp_path / "weights.pth", tmp_path / "clip.bin"]
    network = clipdet(*paths, monkeypatch, prefix)
    spec = dataclasses.replace(loading.DETECTORS[name].spec, name="small-clip", tag="")
    accept_random_weights(monkeypatch, name, spec=spec)
    with torch.inference_mode():
        expected = network(published_pixels(pictures, 224, 224, CLIP, bicubic=True))
    found = scores_of(f"published:{name}={paths[0]},{paths[1]}", pictures)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_diagonal_detail_is_that_of_the_wavelet_transform():
    values = 0.5 * torch.sin(0.37 * torch.arange(3 * 16 * 16, dtype=torch.float64)) + 0.5
    images = values.float().view(1, 3, 16, 16)
    # Measured with pywt and pytorch_wavelets.
    band = [0.000113, -0.000113, -0.022483, -0.033093, -0.026393, -0.005888]
    resized = [0.000113, 0.000014, -0.001511, -0.015493, -0.025799, -0.03243]
    assert wavelet_band(images)[0, 0, 0, :6].tolist() == pytest.approx(band, abs=1e-6)
    assert diagonal_detail(images)[0, 0, 0, :6].tolist() == pytest.approx(resized, abs=1e-6)
    for height, width in ((256, 256), (31, 64), (17, 19)):
        images = torch.rand((2, 3, height, width), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(diagonal_detail(images), resized_band(images), atol=1e-6, rtol=0)


def test_safe_scores_as_published(monkeypatch, tmp_path, pictures):
    network, path = safe(tmp_path / "checkpoint.pth"), tmp_path / "checkpoint.pth"
    with pytest.raises(UserError, match="is not the file of safe: its git blob is"):
        loading.check("safe", str(path))
    accept_random_weights(monkeypatch, "safe")
    with torch.inference_mode():
        probability = network(published_pixels(pictures, 256, None, ((0,) * 3, (1,) * 3))).softmax(dim=1)[
            :, 1
        ]
    found = scores_of(f"published:safe={path}", pictures)
    assert found.std() > 1e-2
    torch.testing.assert_close(found.sigmoid(), probability, atol=1e-5, rtol=0)
    assert "1,438,274 parameters" in loading.check("safe", str(path))[1]


def test_other_checkpoints_are_refused(monkeypatch, tmp_path):
    accept_random_weights(monkeypatch, "safe")
    path = tmp_path / "checkpoint.pth"
    safe(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        good = torch.load(path, weights_only=True)
    for key, value, message in (
        ("bn1.num_batches_tracked", torch.tensor(1.0), "is .*float32, expected .* whole numbers"),
        ("fc1.weight", torch.zeros(1, 512), r"fc1.weight is \(1, 512\)"),
        ("layer3.0.conv1.weight", torch.zeros(1), "has the unexpected key layer3.0.conv1.weight"),
        (7, torch.zeros(1), "has the unexpected key 7"),
    ):
        torch.save(good | {"model": good["model"] | {key: value}}, path)
        with pytest.raises(UserError, match=message):
            loading.check("safe", str(path))
    # A class that a checkpoint has no use for is not loaded.
    torch.save(good | {"args": np.random.default_rng(0)}, path)
    with pytest.raises(UserError, match="is not a readable weights file"):
        loading.check("safe", str(path))


def test_safe_is_used_like_an_expert_from_scores_to_verdicts(monkeypatch, tmp_path, make_set, capsys):
    safe(tmp_path / "checkpoint.pth")
    accept_random_weights(monkeypatch, "safe")
    torch.manual_seed(0)
    save_expert(create_expert("tiny_student", "random"), tmp_path / "tiny")
    reference, out = f"published:safe={tmp_path / 'checkpoint.pth'}", tmp_path / "scores.csv"
    manifest = str(make_set("val", 8))
    settings = ["--experts", reference, str(tmp_path / "tiny"), "--device", "cpu", "--workers", "0"]
    assert predict.main(["--manifest", manifest, *settings, "--out", str(out)]) == 0
    sidecar = json.loads((tmp_path / "scores.csv.json").read_text())
    assert list(sidecar["experts"]) == ["safe", "tiny"]
    assert "Ouxiang-Li/SAFE" in sidecar["published"]["safe"]
    assert sidecar["preprocessing"]["safe"]["std"] == [1, 1, 1]
    calibrator = str(tmp_path / "calibrator.json")
    __main__.main(["calibrate", "--predictions", str(out), "--fpr", "0.4", "--out", calibrator])
    image = str(tmp_path / "val" / "00000.jpg")
    assert predict.main([image, *settings, "--calibrator", calibrator]) == 0
    sweep = ["sweep", manifest, *settings, "--out", str(tmp_path / "sweep"), "--sample", "4", "--no-report"]
    assert evaluate.main([*sweep, "--operations", "jpeg", "--levels", "3"]) == 0
    assert "safe" in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["clean_experts"]
    __main__.main(["explain", image, "--expert", reference, "--out", str(tmp_path / "map.png")])
    assert "P(AI)" in capsys.readouterr().out
