"""Published detectors: pixels and logits as the authors' code gives them, refused files, the commands."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from published_files import (
    CLIP,
    DEPTH,
    IMAGENET,
    WIDTH,
    accept_random_weights,
    accept_small_clip,
    commfor,
    published_pixels,
    rine_logits,
    rine_state,
    small_clip,
)

import distill
import evaluate
import predict
from data_prep import hard_negatives
from featdistill import Detector, __main__
from featdistill.command_line import UserError
from featdistill.data.preprocessing import prepare
from featdistill.inference.predictor import load_ensemble
from featdistill.published import files, loading, rine
from featdistill.published.entry import PublishedGraph

# Sides (height, width): smaller and larger than all inputs, odd and even, and exact ones.
SIDES = [(72, 88), (97, 301), (224, 224), (225, 440), (384, 511), (440, 663), (601, 450), (224, 100)]
GOLDEN = {"ufd": "ufd_fc_weights.pth", "rine_2class": "rine_model_2class_trainable.pth"}


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [smooth_picture(seed, *sides) for seed, sides in enumerate(SIDES)]


@pytest.mark.parametrize(("size", "resized"), [(384, 440), (224, 256)])
def test_pixels_are_torchvision_s_to_the_last_bit(pictures, size, resized):
    for picture in [*pictures, smooth_picture(1, 1200, 77)]:
        expected = (255 * published_pixels([picture], size, resized, ((0,) * 3, (1,) * 3))[0]).round()
        assert torch.equal(prepare(picture, size, f"bilinear:{resized}").float(), expected)


def test_a_crop_without_resizing_has_torchvision_s_black_border(pictures):
    for picture in [*pictures, smooth_picture(1, 15, 600), smooth_picture(2, 223, 225)]:
        expected = (255 * published_pixels([picture], 224, None, ((0,) * 3, (1,) * 3))[0]).round()
        assert torch.equal(prepare(picture, 224, "pad").float(), expected)


def scores_of(reference: str, pictures: list[np.ndarray]) -> torch.Tensor:
    """Logits through the detector for programs, as every command computes them."""
    detector = Detector.load(reference, device="cpu", precision="fp32")
    assert detector.predictor.names == [loading.name_of(reference)]
    return torch.tensor([row.logit for row in detector(pictures)], dtype=torch.float32)


@pytest.mark.parametrize(("size", "resized"), [(384, 440), (224, 256)])
def test_community_forensics_scores_as_published(monkeypatch, tmp_path, pictures, size, resized):
    vit, name = commfor(size, tmp_path / "model.safetensors"), f"commfor_{size}"
    with pytest.raises(UserError, match=f"is not the file of {name}: its SHA-256 is .*download https"):
        loading.load_published(f"published:{name}={tmp_path / 'model.safetensors'}")
    accept_random_weights(monkeypatch, name)
    with torch.inference_mode():
        expected = vit(published_pixels(pictures[::4], size, resized, IMAGENET))[:, 0]
    found = scores_of(f"published:{name}={tmp_path / 'model.safetensors'}", pictures[::4])
    assert expected.std() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_universalfakedetect_scores_as_published(monkeypatch, tmp_path, pictures):
    visual = small_clip(tmp_path / "clip.pt")
    accept_small_clip(monkeypatch, "ufd")
    head = {"weight": torch.randn(1, visual.output_dim), "bias": torch.tensor([-0.5])}
    torch.save(head, tmp_path / "head.pth")
    with torch.inference_mode():
        feature = visual(published_pixels(pictures, 224, None, CLIP))
        expected = torch.nn.functional.linear(feature, head["weight"], head["bias"])[:, 0]
    found = scores_of(f"published:ufd={tmp_path / 'head.pth'},{tmp_path / 'clip.pt'}", pictures)
    assert expected.std() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "layers"), [("rine_4class", 2), ("rine_2class", 4)])
def test_rine_scores_as_published(monkeypatch, tmp_path, pictures, name, layers):
    visual, dim = small_clip(tmp_path / "clip.pt"), 16
    make = loading.DETECTORS[name].make.func
    accept_small_clip(monkeypatch, name, make=lambda *given: make(*given, layers=layers, dim=dim))
    state = rine_state(layers, dim, WIDTH, DEPTH)
    torch.save(state, tmp_path / "head.pth")
    with torch.inference_mode():
        expected = rine_logits(state, visual, published_pixels(pictures, 224, None, CLIP))
    reference = f"published:{name}={tmp_path / 'head.pth'},{tmp_path / 'clip.pt'}"
    assert expected.std() > 1e-3
    torch.testing.assert_close(scores_of(reference, pictures), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="RINE only gives scores"):
        loading.load_published(reference).expert.encode(torch.zeros(1, 3, 224, 224), layers=2)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_published_heads_give_the_known_logits(shared, capsys, name):
    path = shared / "golden" / "published" / GOLDEN[name]
    __main__.main(["published", "--check", name, str(path)])
    known, keys, head = capsys.readouterr().out.splitlines()
    assert "is that of the published file" in known and "keys and shapes" in keys
    logit = {"ufd": 4.1732936, "rine_2class": -2.1957588}[name]
    assert float(head.split()[3]) == pytest.approx(logit, abs=1e-5)


def test_a_file_has_as_many_parameters_as_published():
    clips = {}
    with torch.device("meta"):
        for name, entry in loading.DETECTORS.items():
            if isinstance(entry, PublishedGraph):
                continue
            backbone = loading.build(entry.spec) if entry.has_backbone else clips.get(entry.spec.full_name)
            backbone = backbone or clips.setdefault(entry.spec.full_name, loading.build(entry.spec))
            parameters = entry.make(backbone, entry.spec, entry.resize).named_parameters()
            found = {entry.name_in_file(key): tuple(value.shape) for key, value in parameters}
            found.pop(None, None)
            assert sum(map(np.prod, found.values())) == entry.parameters
            if name.startswith("rine"):
                settings = entry.make.keywords
                shapes = {"alpha": (1, 24, settings["dim"]), "head.6.weight": (1, settings["dim"])}
                assert shapes.items() <= found.items()
                assert ("proj1.10.weight" in found) == ("proj2.10.bias" in found) == (settings["layers"] == 4)


def test_other_files_are_refused_in_one_line(monkeypatch, tmp_path):
    accept_small_clip(monkeypatch, "ufd")
    good = {"weight": torch.zeros(1, 24), "bias": torch.zeros(1)}
    for state, message in (
        ({"weight": good["weight"]}, "lacks the key bias"),
        (good | {"scale": torch.zeros(1)}, "has the unexpected key scale"),
        (
            good | {"weight": torch.zeros(1, 1024)},
            r"weight is \(1, 1024\) .*32, expected \(1, 24\)",
        ),
        (good | {"bias": torch.zeros(1, dtype=torch.int64)}, "bias is .*int64, expected"),
        (good | {"bias": "0"}, "bias is str, expected"),
        (good | {"bias": rine.Blend(1, 1, 1, 1)}, "is not a readable weights file"),  # code in a pickle
        ([1], "has no state dict"),
    ):
        torch.save(state, tmp_path / "head.pth")
        with pytest.raises(UserError, match=message) as caught:
            loading.check("ufd", str(tmp_path / "head.pth"))
        assert "\n" not in str(caught.value)
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="is not a readable weights file"):
        loading.check("ufd", str(tmp_path / "bad.safetensors"))


def test_a_reference_that_is_not_one_is_refused(tmp_path):
    for reference, message in (
        ("published:ufdd", r"unknown published detector 'ufdd' \(did you mean ufd\?\)"),
        ("published:commfor_224=a,b", "the file of commfor_224 holds its backbone"),
        (
            "published:commfor_224=nowhere.safetensors",
            "nowhere.safetensors does not exist; download it from http",
        ),
        ("published:rine_2class=nowhere.pth", "nowhere.pth does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            load_ensemble([reference], device="cpu")


def test_commands_that_need_a_folder_say_so(tmp_path, make_set):
    manifest, out = str(make_set("val", 4)), str(tmp_path / "out")
    named = ["--expert", "published:ufd"]
    distilled = ["--train", manifest, "--val", manifest, "--out", out, "--recipe", "clip_l14_a"]
    for command in (
        lambda: __main__.main(["embed", "--manifest", manifest, *named, "--out", out]),
        lambda: distill.main([*distilled, "--teacher", "published:ufd"]),
        lambda: distill.main([*distilled, "--teachers", "published:ufd"]),
        lambda: hard_negatives.main([manifest, "--method", "pgd", *named, "--out", out]),
    ):
        with pytest.raises(UserError, match="published:ufd can only be scored with; name the folder"):
            command()


def test_git_s_hash_of_a_file_is_checked(monkeypatch, tmp_path):
    accept_random_weights(monkeypatch, "ufd")
    entry = loading.DETECTORS["ufd"]
    (tmp_path / "file").write_bytes(b"hello\n")
    # git hash-object of these bytes
    expected = dataclasses.replace(entry, git_blob="ce013625030ba8dba906f756967f9e9ca394464a")
    assert files.verify(tmp_path / "file", "ufd", expected).startswith("5891b5b522d5df08")
    (tmp_path / "file").write_bytes(b"hello")
    with pytest.raises(UserError, match="its git blob is"):
        files.verify(tmp_path / "file", "ufd", expected)


def test_downloads_come_from_the_fixed_commit_once(monkeypatch, tmp_path):
    fetched = []

    def from_hub(repository, file, revision):
        fetched.append(f"{repository}/{file}@{revision}")
        return str(tmp_path / "model.safetensors")

    def from_github(address, target, progress):
        fetched.append(address)
        torch.save({}, target)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", from_hub)
    monkeypatch.setattr("torch.hub.download_url_to_file", from_github)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    assert (
        files.fetch("commfor_224", loading.DETECTORS["commfor_224"].source) == tmp_path / "model.safetensors"
    )
    paths = {files.fetch(name, loading.DETECTORS[name].source) for name in ("ufd", "rine_4class", "ufd")}
    assert len(paths) == 2 and all(path.is_file() for path in paths)
    assert fetched == [
        "OwensLab/commfor-model-224/model.safetensors@26afc31e6b40c312c3fd42c05a758be62446215b",
        "https://github.com/WisconsinAIVision/UniversalFakeDetect/raw/"
        "76a0e3e60a8a06458707a625d269ba815a2e5919/pretrained_weights/fc_weights.pth",
        "https://github.com/mever-team/rine/raw/9b7fd5857cc205d0412be6aeee0d7611b95bd620/ckpt/"
        "model_4class_trainable.pth",
    ]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises(
        UserError, match=r"cannot download https://huggingface.co/.* write published:commfor_384=FILE"
    ):
        files.fetch("commfor_384", loading.DETECTORS["commfor_384"].source)


def test_published_and_own_experts_are_scored_calibrated_and_swept_together(
    monkeypatch, tmp_path, make_set, capsys
):
    commfor(224, tmp_path / "model.safetensors", depth=2)
    spec = dataclasses.replace(loading.DETECTORS["commfor_224"].spec, options={"depth": 2})
    accept_random_weights(monkeypatch, "commfor_224", spec=spec)
    small_clip(tmp_path / "clip.pt")
    accept_small_clip(monkeypatch, "ufd")
    torch.save({"weight": torch.randn(1, 24), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    manifest, out = str(make_set("val", 8)), tmp_path / "scores.csv"
    experts = [f"published:commfor_224={tmp_path / 'model.safetensors'}"]
    experts.append(f"published:ufd={tmp_path / 'head.pth'},{tmp_path / 'clip.pt'}")
    settings = ["--experts", *experts, "--device", "cpu", "--workers", "0"]
    score = ["--manifest", manifest, *settings, "--out", str(out)]
    assert predict.main(score) == 0
    sidecar = json.loads((tmp_path / "scores.csv.json").read_text())
    assert list(sidecar["experts"]) == ["commfor_224", "ufd"]
    assert sidecar["preprocessing"]["ufd"]["resize"] == "pad"
    assert "OwensLab/commfor-model-224" in sidecar["published"]["commfor_224"]
    assert sidecar["experts"]["commfor_224"] in sidecar["published"]["commfor_224"]
    assert predict.main(score) == 0 and "nothing to do" in capsys.readouterr().out
    calibrator = str(tmp_path / "calibrator.json")
    __main__.main(["calibrate", "--predictions", str(out), "--fpr", "0.4", "--out", calibrator])
    image = str(tmp_path / "val" / "00000.jpg")
    assert predict.main([image, *settings, "--calibrator", calibrator]) == 0
    sweep = ["sweep", manifest, *settings, "--out", str(tmp_path / "sweep"), "--sample", "4", "--no-report"]
    assert evaluate.main([*sweep, "--operations", "jpeg", "--levels", "3", "--tta", "scales"]) == 0
    assert "ufd" in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["clean_experts"]
    with pytest.raises(UserError, match="experts do not record where"):
        predict.main(["--split", "val", *settings])
    for expert in experts:
        __main__.main(["explain", image, "--expert", expert, "--out", str(tmp_path / "map.png")])
        assert "P(AI)" in capsys.readouterr().out
    # Another backbone under the same head is another expert.
    state = torch.load(tmp_path / "clip.pt", weights_only=True)
    torch.save({key: value + 0.01 for key, value in state.items()}, tmp_path / "clip.pt")
    with pytest.raises(UserError, match="different settings"):
        predict.main(score)
    with pytest.raises(UserError, match="fitted for other scores"):
        predict.main([image, *settings, "--calibrator", calibrator])


def test_the_list_names_license_size_input_and_source(capsys):
    __main__.main(["published", "--list"])
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert all(name in rows for name in loading.DETECTORS)
    for part in ("MIT", "21,811,969", "440", "384 px", "huggingface.co/OwensLab/commfor-model-384"):
        assert part in rows["commfor_384"]
    assert "Apache-2.0" in rows["rine_4class"] and "not resized, center 224 px" in rows["ufd"]
    with pytest.raises(UserError, match="one detector and one file"):
        __main__.main(["published", "--check", "ufd", "a", "b"])
