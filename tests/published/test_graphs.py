"""Detectra and Sieve: pixels and probabilities as the authors' code gives them, for files like theirs."""

import json

import numpy as np
import pytest
from conftest import smooth_picture
from PIL import Image
from published_files import accept_random_weights

import evaluate
import predict
from featdistill import Detector, __main__
from featdistill.command_line import UserError
from featdistill.data.preprocessing import prepare
from featdistill.models.expert import create_expert, save_expert
from featdistill.published import files, loading

# Sides (height, width): the longer side rounds up and down, crops at odd and even distances.
SIDES = [(440, 663), (384, 511), (97, 301), (601, 450), (440, 440), (333, 1000), (72, 88)]
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
WEIGHTS = np.random.default_rng(0).normal(0, 2e-3, (3, 384, 384)).astype(np.float32)


def published_pixels(picture: np.ndarray) -> np.ndarray:
    """The authors' input (1, 384, 384, 3) before normalization."""
    image, crop = Image.fromarray(picture), 384
    scale = 440 / min(image.size)
    image = image.resize([max(crop, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - crop) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32)


def write_graph(path, count: int | str, name: str) -> None:
    """Write a graph that sums up weighted pixels, of the inputs and outputs of the published ones."""
    onnx = pytest.importorskip("onnx")
    helper, float_ = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Mul", [name, "weights"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "axes"], ["sums"], keepdims=0),
        helper.make_node("Unsqueeze", ["sums", "last"], ["logit"]),
    ]
    constants = {"weights": WEIGHTS[None], "axes": np.array([1, 2, 3]), "last": np.array([1])}
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info(name, float_, [count, 3, 384, 384])],
        [helper.make_tensor_value_info("logit", float_, [count, 1])],
        [onnx.numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture
def graph_files(monkeypatch, tmp_path) -> dict[str, str]:
    """References to both detectors, with graphs of one and of any number of images."""
    pytest.importorskip("onnxruntime")
    references = {}
    for name, count, key in (("detectra", 1, "pixel_values"), ("sieve", "batch", "input")):
        write_graph(tmp_path / f"{name}.onnx", count, key)
        references[name] = f"published:{name}={tmp_path / f'{name}.onnx'}"
        with pytest.raises(UserError, match=f"is not the file of {name}: its SHA-256 is"):
            loading.load_published(references[name])
        accept_random_weights(monkeypatch, name)
    return references


def test_pixels_are_those_of_the_authors_to_the_last_bit():
    for seed, sides in enumerate([*SIDES, (1200, 77)]):
        picture = smooth_picture(seed, *sides)
        found = prepare(picture, 384, "rounded:440").permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(found, published_pixels(picture))


def test_scores_are_the_published_probabilities(graph_files):
    pictures = [smooth_picture(seed, *sides) for seed, sides in enumerate(SIDES)]
    inputs = np.stack([(published_pixels(picture) / 255 - MEAN) / STD for picture in pictures])
    logits = (inputs.transpose(0, 3, 1, 2).astype(np.float64) * WEIGHTS).sum((1, 2, 3))
    assert logits.std() > 0.1
    for name, calibrated in (("detectra", 1.121656 * logits + 0.506874), ("sieve", logits + 0.43)):
        found = [row.score for row in Detector.load(graph_files[name], device="cpu")(pictures)]
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-calibrated)), atol=1e-5)


def test_check_says_what_a_graph_takes_and_refuses_others(graph_files, capsys, tmp_path):
    for name in graph_files:
        __main__.main(["published", "--check", name, str(tmp_path / f"{name}.onnx")])
        assert "takes images of 384 px and returns one number each" in capsys.readouterr().out
    (tmp_path / "sieve.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match=r"sieve.onnx cannot be loaded by onnxruntime") as caught:
        loading.load_published(graph_files["sieve"])
    assert "\n" not in str(caught.value)


def test_a_release_is_downloaded_from_its_page(monkeypatch, tmp_path):
    fetched = []
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda address, *_, **__: fetched.append(address))
    source = loading.DETECTORS["sieve"].source
    files.fetch("detectra", source)
    released = "https://github.com/Phineas1500/sieve-ai-image-detector/releases/download/v0.10.0"
    assert fetched == [source.page] == [f"{released}/ft44s_best_fp16.onnx"]


def test_a_graph_is_used_like_an_expert_from_scores_to_verdicts(graph_files, tmp_path, make_set, capsys):
    save_expert(create_expert("tiny_student", "random"), tmp_path / "tiny")
    manifest, out = str(make_set("val", 8)), tmp_path / "scores.csv"
    settings = ["--experts", *graph_files.values(), str(tmp_path / "tiny"), "--workers", "0"]
    score = ["--manifest", manifest, *settings, "--out", str(out)]
    assert predict.main(score) == 0
    sidecar = json.loads((tmp_path / "scores.csv.json").read_text())
    assert list(sidecar["experts"]) == ["detectra", "sieve", "tiny"]
    assert sidecar["experts"]["sieve"] in sidecar["published"]["sieve"]
    assert sidecar["preprocessing"]["sieve"]["resize"] == "rounded:440"
    assert predict.main(score) == 0 and "nothing to do" in capsys.readouterr().out
    calibrator = str(tmp_path / "calibrator.json")
    __main__.main(["calibrate", "--predictions", str(out), "--fpr", "0.4", "--out", calibrator])
    assert predict.main([str(tmp_path / "val" / "00000.jpg"), *settings, "--calibrator", calibrator]) == 0
    sweep = ["sweep", manifest, *settings, "--out", str(tmp_path / "sweep"), "--sample", "4", "--no-report"]
    assert evaluate.main([*sweep, "--operations", "jpeg", "--levels", "3"]) == 0
    with pytest.raises(UserError, match="graph"):
        image = str(tmp_path / "val" / "00000.jpg")
        explained = ["explain", image, "--expert", graph_files["sieve"], "--out", str(tmp_path / "map.png")]
        __main__.main(explained)
    assert "detectra" in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["clean_experts"]
