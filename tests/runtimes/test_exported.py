"""`onnx:DIR`: an exported graph scores like an expert, alone and in an ensemble; what cannot work says so."""

import json

import numpy as np
import pytest
from conftest import smooth_picture
from graph_files import write_graph
from PIL import Image

import predict
from featdistill import Detector, __main__, atomic
from featdistill.command_line import UserError
from featdistill.inference.predictor import load_ensemble
from featdistill.models.expert import create_expert, save_expert
from featdistill.runtimes.exported import CARD_FILE, FORMAT, read_export_card, write_export_card


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "brightness"
    folder.mkdir()
    card = {
        "format": FORMAT,
        "graph_format": "onnx",
        "files": {"model.onnx": atomic.sha256_of(write_graph(folder / "model.onnx"))},
        "preprocessing": {"size": 8, "resize": "squash", "mean": [0.5] * 3, "std": [0.5] * 3},
        "experts": {"clip_a": {"weights_sha256": "1" * 64}},
        "precision": "fp32",
    }
    write_export_card(folder, card)
    return folder


def pictures():
    return [np.full((20, 30, 3), value, np.uint8) for value in (0, 120, 250)]


def test_a_graph_scores_like_an_expert(exported, tmp_path, capsys):
    detector = Detector.load(f"onnx:{exported}", tta="hflip", resize="crop")
    logits = [row.logit for row in detector(pictures())]
    np.testing.assert_allclose(logits, [-6, 0, 6.5], atol=1e-5)
    for index, picture in enumerate(pictures()):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    out = tmp_path / "scores.csv"
    command = ["--images", str(tmp_path), "--experts", f"onnx:{exported}", "--out", str(out)]
    assert predict.main([*command, "--workers", "0"]) == 0
    sidecar = json.loads(out.with_suffix(".csv.json").read_text())
    assert sidecar["experts"] == {"brightness": detector.predictor.hashes["brightness"]}
    assert sidecar["exported"]["brightness"] == f"onnx fp32 of clip_a (SHA-256 {'1' * 64})"
    assert [float(line.split(",")[1]) for line in out.read_text().splitlines()[1:]][1] == pytest.approx(0.5)


def test_a_graph_and_a_trained_expert_form_an_ensemble(exported, tmp_path):
    save_expert(create_expert("tiny_clip", "random"), tmp_path / "clip" / "expert")
    detector = Detector.load(f"onnx:{exported}", tmp_path / "clip" / "expert", weights="brightness=3,clip=1")
    for row in detector([smooth_picture(40, 50), *pictures()]):
        experts = row.experts
        assert row.score == pytest.approx(0.75 * experts["brightness"] + 0.25 * experts["clip"])


@pytest.mark.parametrize(
    "settings", [{"precision": "bf16"}, {"compiled": True}, {"device": "meta"}, {"device": "cuda:99"}]
)
def test_graphs_run_as_they_were_exported(exported, settings):
    with pytest.raises(UserError, match="brightness is a graph: it runs on the CPU"):
        load_ensemble([f"onnx:{exported}"], **settings)


def test_what_needs_layers_is_refused(exported, tmp_path):
    Image.fromarray(smooth_picture(40, 40)).save(tmp_path / "photo.png")
    command = [
        str(tmp_path / "photo.png"),
        "--expert",
        f"onnx:{exported}",
        "--out",
        str(tmp_path / "map.png"),
    ]
    with pytest.raises(UserError, match=r"a map needs an expert in PyTorch; .*model\.onnx is a graph"):
        __main__.explain(command)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder, card: (folder / CARD_FILE).unlink(), r"is not an export: it has no export\.json"),
        (lambda folder, card: card.update(format="x"), "has format 'x'; this version reads format"),
        (lambda folder, card: card.pop("experts"), "is incomplete"),
        (lambda folder, card: card.update(files={}), r"does not give the SHA-256 of model\.onnx"),
        (lambda folder, card: card["files"].update({"../x": "0"}), r"has no \.\./x"),
        (lambda folder, card: write_graph(folder / "model.onnx", weight=1.0), "its SHA-256 differs"),
        (lambda folder, card: (folder / "model.onnx").unlink(), r"has no model\.onnx"),
    ],
)
def test_a_damaged_export_is_one_line(exported, damage, message):
    card = read_export_card(exported)
    damage(exported, card)
    if (exported / CARD_FILE).exists():
        write_export_card(exported, card)
    with pytest.raises(UserError, match=message):
        load_ensemble([f"onnx:{exported}"])


def test_preprocessing_that_was_changed_is_refused_or_is_another_expert(exported):
    before = load_ensemble([f"onnx:{exported}"]).hashes
    file = exported / CARD_FILE
    file.write_text(file.read_text().replace('"squash"', '"crop"'))
    with pytest.raises(UserError, match=r"export\.json was changed after the export \(its SHA-256 differs\)"):
        load_ensemble([f"onnx:{exported}"])
    content = json.loads(file.read_text())
    write_export_card(exported, {key: content[key] for key in content if key != "sha256"})
    assert load_ensemble([f"onnx:{exported}"]).hashes != before


def test_a_reference_that_is_almost_one_of_an_export_is_helped(exported):
    with pytest.raises(UserError, match="onnx: names no folder; write onnx:DIR"):
        load_ensemble(["onnx:"])
    with pytest.raises(UserError, match=f"not an expert; did you mean onnx:{exported}"):
        load_ensemble([str(exported)])
