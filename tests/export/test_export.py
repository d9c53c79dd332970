"""Exports score like the experts they were made from, or are refused; the example needs no toolkit."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image

pytest.importorskip("onnxscript", reason='needs pip install ".[export]"')
pytest.importorskip("onnxruntime", reason='needs pip install ".[export]"')

from featdistill import Detector, __main__
from featdistill.command_line import UserError
from featdistill.data.preprocessing import prepare
from featdistill.export import example, gate, tracing
from featdistill.inference.fusion import Fusion
from featdistill.models.expert import create_expert, save_expert
from featdistill.records.logits import logits_of
from featdistill.records.manifest import make_manifest, write_manifest

COUNT = 16
has_openvino = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not has_openvino, reason="openvino is not installed")
each_format = pytest.mark.parametrize(
    "graph_format", ["onnx", pytest.param("openvino", marks=needs_openvino)]
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with two experts, images and a manifest."""
    folder = tmp_path_factory.mktemp("export")
    for seed, (name, feature) in enumerate({"clip": "mean+std:1,2", "siglip": "pool"}.items()):
        torch.manual_seed(seed)
        expert = create_expert(f"tiny_{name}", "random", input_size=32, feature=feature, resize="shorter")
        save_expert(expert, folder / name / "expert")
    save_expert(create_expert("tiny_clip", "random", input_size=48), folder / "large" / "expert")
    (folder / "images").mkdir()
    names = [f"{seed}.png" for seed in range(COUNT)]
    for seed, name in enumerate(names):
        Image.fromarray(smooth_picture(seed)).save(folder / "images" / name)
    rows = {"image": [f"images/{name}" for name in names], "name": names, "label": [0, 1] * (COUNT // 2)}
    write_manifest(make_manifest(rows), folder / "images.csv")
    return folder


@pytest.fixture(autouse=True)
def traced_once(place, monkeypatch):
    """Tracing takes seconds: let tests share the files."""
    traced = tracing.write_onnx

    def cached(experts, fusion, path):
        kept = place / f".{'+'.join(experts)}.onnx"
        if not kept.exists():
            traced(experts, fusion, kept)
        shutil.copyfile(kept, path)

    monkeypatch.setattr(tracing, "write_onnx", cached)
    return traced


def export(place, *names, out="out", graph_format="onnx", source=None, flags=()):
    experts = [name if ":" in name else str(place / name / "expert") for name in names]
    source = source or ["--manifest", str(place / "images.csv")]
    __main__.main(["export", *experts, "--format", graph_format, "--out", str(place / out), *source, *flags])
    return json.loads((place / out / "export.json").read_text())


def logits(place, *experts, **settings):
    pictures = sorted((place / "images").glob("*.png"), key=lambda path: int(path.stem))
    detector = Detector.load(*experts, **settings)
    return np.array([row.logit for row in detector(pictures)])


@each_format
def test_an_ensemble_in_one_graph_gives_the_fused_score(place, graph_format, capsys):
    flags = ["--fusion", "probability_mean", "--weights", "clip=3,siglip=1"]
    card = export(place, "clip", "siglip", out=graph_format, graph_format=graph_format, flags=flags)
    assert "logits of 16 images differ by" in capsys.readouterr().out
    assert card["parity"]["figures"]["images"] == COUNT
    assert card["parity"]["figures"]["auc_before"] == card["parity"]["figures"]["auc_after"]
    expected = logits(
        place, *(place / name / "expert" for name in ("clip", "siglip")), weights="clip=3,siglip=1"
    )
    found = logits(place, f"onnx:{place / graph_format}")
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(expected) > 1e-3


@pytest.mark.parametrize("method", ["probability_mean", "logit_mean"])
def test_the_fusion_inside_is_the_fusion_outside(method):
    class Constant(torch.nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = torch.tensor(values)

        def forward(self, images):
            return self.values

    values = {"a": [-40.0, 3.0, 12.0, 0.5], "b": [-35.0, -2.0, 14.0, 0.1]}
    experts = {name: Constant(own) for name, own in values.items()}
    for weights, temperature in (
        (None, None),
        ({"a": 3, "b": 1}, {"a": 2.0, "b": 0.5}),
        ({"a": 1, "b": 0}, None),
    ):
        fusion = Fusion(method, weights, temperature)
        expected = logits_of(fusion.apply(np.array([*values.values()]), [*values]))
        found = tracing.FusedExperts(experts, fusion)(None).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@each_format
def test_half_precision_halves_the_file(place, graph_format):
    sizes = {}
    for precision in ("fp32", "fp16"):
        out = f"{graph_format}-{precision}"
        card = export(place, "clip", out=out, graph_format=graph_format, flags=["--precision", precision])
        sizes[precision] = sum((place / out / name).stat().st_size for name in card["files"])
    assert 0 < card["parity"]["figures"]["max_difference"] < 0.05
    assert sizes["fp16"] < 0.65 * sizes["fp32"]


@each_format
def test_int8_multiplies_integers_or_stores_them(place, graph_format, monkeypatch):
    monkeypatch.setattr(gate, "MAX_AUC_LOSS", 1.0)
    monkeypatch.setitem(sys.modules, "nncf", None)  # the extra does not have it
    flags, compare, found = ["--precision", "int8"], gate.compare, []
    card = export(place, "clip", out=f"{graph_format}-int8", graph_format=graph_format, flags=flags)
    assert (card["stored"], card["int8_group"]) == ("int8", 32)
    assert 1e-5 < card["parity"]["figures"]["max_difference"] < 0.1

    def first_one_fails(*args):
        found.append(compare(*args))
        return found[-1] if len(found) == 2 else dataclasses.replace(found[-1], max_difference=0.5)

    monkeypatch.setattr(gate, "compare", first_one_fails)
    card = export(place, "clip", out="weights", graph_format=graph_format, flags=flags)
    assert (card["precision"], card["stored"], card["int8_group"]) == ("int8", "int8_weights", 0)
    assert found[1].mean_difference != found[0].mean_difference
    expected = logits(place, place / "clip" / "expert")
    np.testing.assert_allclose(logits(place, f"onnx:{place / 'weights'}"), expected, atol=0.1)


def test_a_broken_graph_is_refused_and_nothing_is_left(place, traced_once, monkeypatch):

    def broken(experts, fusion, path):
        with torch.no_grad():
            experts["clip"].head[-1].bias += 0.001
        traced_once(experts, fusion, path)
        with torch.no_grad():
            experts["clip"].head[-1].bias -= 0.001

    export(place, "clip", out="kept")
    before = (place / "kept" / "model.onnx").read_bytes()
    monkeypatch.setattr(tracing, "write_onnx", broken)
    files = sorted(place.iterdir())
    for out in ("refused", "kept"):
        with pytest.raises(
            UserError, match=r"fp32 graph is refused: it moves a logit by 0\.001, and 0\.0001"
        ):
            export(place, "clip", out=out)
    assert sorted(place.iterdir()) == files
    assert (place / "kept" / "model.onnx").read_bytes() == before
    with pytest.raises(UserError, match=r"lowers the AUC from 0\.9000 to 0\.8970"):
        gate.require_parity(gate.Parity(10, 0.05, 0.01, 0.9, 0.897), "int8")
    with pytest.raises(UserError, match="moves a logit by nan"):
        gate.require_parity(gate.Parity(10, float("nan"), 0.0), "fp32")


@pytest.mark.parametrize(
    ("names", "flags", "message"),
    [
        (["clip", "large"], [], r"clip \(32 px, shorter\) and large \(48 px, shorter\) see different inputs"),
        (["clip"], ["--precision", "int8"], "name labeled images with --manifest"),
        (["clip"], ["--weights", "x=1"], "unknown expert"),
        (["none"], [], "is not an expert"),
    ],
)
def test_what_cannot_be_exported_is_one_line(place, names, flags, message):
    with pytest.raises(UserError, match=message):
        export(place, *names, source=["--images", str(place / "images")], flags=flags)
    assert not (place / "out").exists()


def test_a_folder_of_others_and_a_graph_are_refused(place):
    with pytest.raises(UserError, match="was not written by this command"):
        export(place, "clip", out="images")
    export(place, "clip", out="again")
    with pytest.raises(UserError, match="an export needs an expert in PyTorch"):
        export(place, f"onnx:{place / 'again'}", out="x")


def test_a_missing_package_is_one_line(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'onnxruntime is not installed; run pip install "\.\[export\]"'):
        export(place, "clip")


def test_the_example_needs_no_toolkit(place):
    export(place, "siglip", out="shipped")
    picture = place / "images" / "3.png"
    script = "import sys; sys.modules.update(torch=None, featdistill=None, cv2=None); import runpy; "
    script += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"

    def run(*arguments):
        command = [sys.executable, "-c", script, str(place / "shipped" / "example.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run().stderr == "usage: example.py IMAGE\n"
    broken = run(place / "images.csv")
    assert broken.returncode == 1 and broken.stderr.count("\n") == 1 and "could not be read" in broken.stderr
    result = run(picture)
    row = Detector.load(place / "siglip" / "expert")(picture)
    score, logit = (float(part.split()[-1]) for part in result.stdout.split(","))
    assert score == pytest.approx(row.score, abs=0.002) and logit == pytest.approx(row.logit, abs=0.01)


@pytest.mark.parametrize("resize", ["shorter", "squash", "crop", "bilinear:40", "bicubic:40", "pad"])
@pytest.mark.parametrize("shape", [(97, 61), (64, 301), (20, 45), (20, 900)])
def test_the_example_resizes_as_the_toolkit_does(resize, shape):
    image = smooth_picture(5, *shape)
    ours = prepare(image, 32, resize).numpy().astype(int)
    theirs = example.pixels(Image.fromarray(image), 32, resize)[0].astype(int)
    # PyTorch's and Pillow's bicubic filters round differently.
    assert np.abs(ours - theirs).max() <= (1 if resize in ("shorter", "squash") else 0)


def test_the_example_reduces_large_images_first():
    image = smooth_picture(5, 300, 200)
    ours = prepare(image, 32, "shorter", 150).numpy().astype(int)
    theirs = example.pixels(Image.fromarray(image), 32, "shorter", 150)[0].astype(int)
    assert np.abs(ours - theirs).max() <= 2
