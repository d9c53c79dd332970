"""`predict.py --decode gpu`, on a CPU that stands in for the GPU."""

import io

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image

import predict
from featdistill.command_line import UserError
from featdistill.inference import predictor
from featdistill.inference.detector import Detector
from featdistill.inference.predictor import load_ensemble
from featdistill.models.expert import create_expert, save_expert
from featdistill.records.predictions import errors_path, read_predictions, read_sidecar


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> list[str]:
    folders = []
    for seed, (name, backbone, size) in enumerate([("alpha", "tiny_clip", 48), ("beta", "tiny_siglip", 32)]):
        torch.manual_seed(seed)
        expert = create_expert(backbone, "random", input_size=size, head_hidden=8)
        with torch.no_grad():
            expert.head[3].weight.mul_(40)
        folders.append(str(tmp_path_factory.mktemp("experts") / name))
        save_expert(expert.eval(), folders[-1], {})
    return folders


@pytest.fixture
def images(tmp_path) -> str:
    """JPEGs, PNGs and files that are no images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(14):
        data = io.BytesIO()
        Image.fromarray(smooth_picture(number, 60 + number % 3, 90)).save(
            data, "PNG" if number % 4 == 1 else "JPEG"
        )
        content = data.getvalue()[: 500 if number in (5, 6) else None]
        (folder / f"{number:02d}.jpg").write_bytes(content)
    return str(folder)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(predictor, "require_decoder", lambda device: None)


def run(*arguments: str) -> int:
    return predict.main([*arguments, "--workers", "0", "--batch-size", "4", "--device", "cpu"])


@pytest.mark.parametrize("flags", [[], ["--tta", "hflip"], ["--resize", "crop"]])
def test_scores_are_those_of_the_cpu_but_for_rounding(experts, images, tmp_path, on_cpu, flags):
    outs = [str(tmp_path / f"{decode}.csv") for decode in ("cpu", "gpu")]
    for decode, out in zip(("cpu", "gpu"), outs, strict=True):
        arguments = ["--images", images, "--experts", *experts, "--out", out, "--decode", decode]
        assert run(*arguments, *flags) == 1
    normal, found = map(read_predictions, outs)
    assert found["name"].tolist() == normal["name"].tolist() and len(found) == 12
    assert np.abs(found["score"] - normal["score"]).max() < (1e-6 if "crop" in flags else 5e-3)
    assert found["score"].nunique() == 12
    errors = [errors_path(tmp_path / name).read_text() for name in ("cpu.csv", "gpu.csv")]
    assert errors[0] == errors[1] and errors[0].count("\n") == 3


def test_an_output_is_not_continued_the_other_way(experts, images, tmp_path, on_cpu):
    for first, second in (("cpu", "gpu"), ("gpu", "cpu")):
        out = tmp_path / f"{first}.csv"
        arguments = ["--images", images, "--experts", *experts, "--out", str(out), "--decode"]
        run(*arguments, first)
        assert read_sidecar(out).get("decode") == (first if first == "gpu" else None)
        before = out.read_bytes()
        with pytest.raises(UserError, match=r"different settings: decode was .*gpu"):
            run(*arguments, second)
        assert run(*arguments, first) == 1 and out.read_bytes() == before


def test_it_is_refused_where_it_would_not_be_used(experts, images, tmp_path, on_cpu):
    out, ensemble = str(tmp_path / "x.csv"), ["--decode", "gpu", "--experts", *experts]
    with pytest.raises(UserError, match="--decode gpu cuts no test-time views but hflip"):
        run("--images", images, "--out", out, *ensemble, "--tta", "blur")
    with pytest.raises(UserError, match="--decode gpu is for files of predictions"):
        run(f"{images}/00.jpg", *ensemble)
    with pytest.raises(UserError, match="--decode gpu is for files of predictions"):
        Detector.load(*experts, device="cpu", decode="gpu")
    with pytest.raises(UserError, match="unknown --decode 'gqu'"):
        load_ensemble(experts, device="cpu", decode="gqu")


def test_it_needs_a_gpu(experts, images, tmp_path):
    out = tmp_path / "x.csv"
    with pytest.raises(UserError, match=r"^--decode gpu needs a GPU, not cpu; leave it out$"):
        run("--images", images, "--experts", *experts, "--out", str(out), "--decode", "gpu")
    assert not out.exists()
