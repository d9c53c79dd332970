"""What `push` uploads, and what its model card says."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard, constants

from featdistill.__main__ import push as run
from featdistill.calibration.calibrator import Calibrator
from featdistill.command_line import UserError
from featdistill.evaluation.intervals import METHOD
from featdistill.evaluation.splits import load_splits, score_split
from featdistill.hub.model_card import base_model
from featdistill.hub.push import without_paths
from featdistill.models.backbones import BACKBONES, resolve_spec
from featdistill.models.expert import create_expert, load_expert, read_card, save_expert
from featdistill.records.manifest import fingerprint, make_manifest, read_manifest, write_manifest
from featdistill.records.predictions import write_predictions

OPEN, CLOSED = "CC BY 4.0", "CC BY-NC-SA 4.0"


@pytest.fixture
def manifest(tmp_path) -> Path:
    """Six images of two sources, one of them for non-commercial use; the images themselves do not exist."""
    rows = {"image": [f"{number}.png" for number in range(6)], "name": list("abcdef")}
    rows |= {"label": [0, 1, 0, 1, 1, 1], "source": ["photos", "photos", *["faces|old"] * 4]}
    rows |= {"generator": ["", "sdxl", "", "flux", "flux", "flux"], "is_distorted": [0, 1, 0, None, 0, 0]}
    rows |= {"licence": [OPEN, "", CLOSED, CLOSED, CLOSED, ""]}
    path = tmp_path / "my data" / "train.csv"
    path.parent.mkdir()
    write_manifest(make_manifest(rows), path)
    return path


@pytest.fixture
def expert(tmp_path, manifest) -> Path:
    folder = tmp_path / "runs" / "tiny" / "expert"
    data = {"train": [{"path": str(manifest), "sha256": fingerprint(read_manifest(manifest))}]}
    data["val"] = [{"path": str(tmp_path / "gone.csv"), "sha256": "1" * 64}]
    recipe = {"name": "tiny", "weights": "random", "distortions": "official", "cache": str(tmp_path / "a b")}
    teacher = {"path": str(tmp_path / "stage1" / "tiny" / "expert-last"), "weights_sha256": "2" * 64}
    metrics = {"holdout": {"images": 1200, "clean_auc": 0.98765, "robust_auc": None}}
    card = {"recipe": recipe, "data": data, "teacher": teacher, "metrics": metrics, "epoch": 3}
    save_expert(create_expert("tiny_clip", "random", input_size=32, head_hidden=8), folder, card)
    return folder


@pytest.fixture
def write(expert, tmp_path):
    """Return a function that runs `push --dry-run` and gives what it wrote: name -> text or bytes."""

    def write(*arguments: object) -> dict[str, str]:
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        run([str(expert), "me/tiny", "--dry-run", "--out", str(out), *map(str, arguments)])
        return {
            path.name: path.read_bytes() if path.suffix == ".safetensors" else path.read_text()
            for path in out.iterdir()
        }

    return write


@pytest.fixture
def metrics(tmp_path, manifest, expert) -> Path:
    """What evaluate.py writes for the expert, whose scores tell all images apart but one pair."""
    predictions = tmp_path / "scores.csv"
    scores = np.array([0.1, 0.9, 0.85, 0.8, 0.95, 0.99])
    sidecar = {"experts": {"tiny": read_card(expert)["weights_sha256"]}}
    write_predictions(predictions, list("abcdef"), scores, {"tiny": scores}, sidecar)
    (split,) = load_splits([str(predictions)], [str(manifest)], [])
    path = tmp_path / "metrics.json"
    result = {"splits": {"scores": score_split(split)}, "intervals": METHOD, "notes": []}
    path.write_text(json.dumps(result))
    return path


def make_calibrator(expert: Path, path: Path, **changes: object) -> Path:
    card = read_card(expert)
    made_for = {
        "experts": {"their_name": card["weights_sha256"]},
        "preprocessing": {"their_name": load_expert(expert).preprocessing.describe()},
        "fusion": "probability_mean",
        "tta": "hflip",
    }
    values = {"slope": 1.0, "intercept": 0.0}
    Calibrator(made_for | changes, 2.0, -2.0, 0.01, 0.05, "platt", values, 400, 300).save(path)
    return path


def test_a_dry_run_writes_what_would_be_uploaded(write, expert, tmp_path):
    files = write("--license", "apache-2.0")
    assert set(files) == {"README.md", "expert.json", "expert.safetensors"}
    assert files["expert.safetensors"] == (expert / "expert.safetensors").read_bytes()
    card, own = json.loads(files["expert.json"]), read_card(expert)
    assert card.pop("data")["train"][0]["path"] == "train.csv" and own.pop("data")
    assert card.pop("teacher")["path"] == "tiny/expert-last" and own.pop("teacher")
    assert card["recipe"].pop("cache") == "a b" and own["recipe"].pop("cache")
    assert card == own
    assert str(tmp_path) not in files["README.md"] + files["expert.json"]


def test_the_model_card_says_what_is_known(write, expert, metrics):
    text = write("--license", "apache-2.0", "--metrics", metrics)["README.md"]
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "featdistill",
        "image-classification",
    )
    assert data.base_model is None and "ai-generated-image-detection" in data.tags
    parameters = sum(parameter.numel() for parameter in load_expert(expert).parameters())
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert f"| parameters | {parameters:,} |" in rows and "tiny:clip" in text
    assert f"| photos | {OPEN} | 1 | 0 | 0 | 0 |" in rows
    assert "| photos | not recorded | 0 | 1 | 0 | 1 |" in rows
    assert f"| faces\\|old | {CLOSED} | 1 | 2 | 0 | 0 |" in rows
    assert "**gone.csv** (hold-out, SHA-256 111111111111...): not at hand" in text
    assert "Generators of its training images: flux, sdxl." in text
    assert "In a checkout of FeatDistill, `pip install .` installs it." in text
    assert "Training drew the distortions `official`" in text
    assert "**3 of 6 training images are under terms that exclude commercial" in text
    assert "Training images without a license on record: 2 of 6." in text
    assert "| holdout, images | 1,200 |" in rows and "| holdout, clean_auc | 0.9877 |" in rows
    # 8 pairs, of which one is in the wrong order.
    assert any("0.8750 [" in row for row in rows) and "with 95 % intervals (DeLong):" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["recipe"]["distortions"] == "official"
    assert 'Detector.load("hub:me/tiny")' in text and "calibrator.json" not in text


def test_pretrained_weights_are_named_with_their_license(tmp_path):
    made = create_expert("timm:test_vit.r160_in1k", "random", input_size=64)
    save_expert(made, tmp_path / "expert", {"recipe": {"weights": "hub"}})
    run([str(tmp_path / "expert"), "me/vit", "--dry-run", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(text).data.base_model == "timm/test_vit.r160_in1k"
    assert "published weights of the backbone; their license: Apache-2.0." in text
    assert "The expert's card names no training data." in text and "None are recorded." in text


def test_a_license_that_the_training_images_contradict_is_pointed_out(write, caplog):
    logging.getLogger("featdistill").propagate = True
    try:
        write("--license", "mit")
        assert f"--license mit, but 3 of 6 training images have other terms ({CLOSED})" in caplog.text
        caplog.clear()
        assert "states no license" in write()["README.md"]
        write("--license", "cc-by-nc-4.0")
        assert not caplog.text
    finally:
        logging.getLogger("featdistill").propagate = False


def test_a_manifest_that_has_changed_is_not_described(write, manifest):
    rows = read_manifest(manifest)
    write_manifest(rows.assign(label=1 - rows["label"]), manifest)
    text = write()["README.md"]
    assert "not the same now as in training" in text and "photos" not in text
    assert "licenses of the training images are not known in full" in text


def test_a_calibrator_goes_along(write, expert, tmp_path):
    path = make_calibrator(expert, tmp_path / "own.json")
    files = write("--calibrator", path)
    assert json.loads(files["calibrator.json"]) == json.loads(path.read_text())
    assert 'calibrator=hf_hub_download("me/tiny", "calibrator.json"),' in files["README.md"]
    assert "tta='hflip'" in files["README.md"] and "fusion=" not in files["README.md"]
    assert "At most 1 % of real images like those it was calibrated on are called AI" in files["README.md"]
    code = files["README.md"].split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    other = make_calibrator(expert, tmp_path / "other.json", experts={"their_name": "4" * 64})
    with pytest.raises(UserError, match="fitted for other scores than those of this expert"):
        write("--calibrator", other)
    two = make_calibrator(expert, tmp_path / "two.json", experts={"a": "4" * 64, "b": "5" * 64})
    with pytest.raises(UserError, match="fitted for 2 experts together"):
        write("--calibrator", two)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/my data/train.csv", "train.csv"),
        ("C:\\Users\\me\\train.csv", "train.csv"),
        ("~/runs/clip/expert", "clip/expert"),
        ("see /home/me/notes.txt, and x/y", "see notes.txt, and x/y"),
        ("--root=/data/me/photos", "--root=photos"),
        ("https://huggingface.co/me/tiny", "https://huggingface.co/me/tiny"),
        ("vit_base/16 and/or 1 / 255", "vit_base/16 and/or 1 / 255"),
        ({"path": "runs/me/clip/expert-last"}, {"path": "clip/expert-last"}),
        ({"path": "hub:me/tiny@1"}, {"path": "hub:me/tiny@1"}),
        ({"path": [1.0], "n": [{"path": "/a/b"}, None]}, {"path": [1.0], "n": [{"path": "b"}, None]}),
    ],
)
def test_paths_are_reduced_to_names(value, expected):
    assert without_paths(value) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "belong together"),
        (["--out", "x"], "belong together"),
        (["--dry-run", "--out", "{tmp}", "--private"], "--private has no effect"),
        (["--dry-run", "--out", "{tmp}"], "already exists and was not written by this command"),
        (["--metrics", "{tmp}/none.json"], "none.json do not exist; use the metrics.json"),
        (["--metrics", "{tmp}/runs/tiny/expert/expert.json"], "does not hold metrics"),
        (["--calibrator", "{tmp}/none.json"], "none.json does not exist"),
    ],
)
def test_wrong_arguments_are_refused(expert, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        run([str(expert), "me/tiny", *(word.format(tmp=tmp_path) for word in arguments)])


def test_metrics_of_an_ensemble_are_refused(write, metrics):
    result = json.loads(metrics.read_text())
    experts = result["splits"]["scores"]["experts"]["experts"]
    experts["another"] = experts["tiny"]
    metrics.write_text(json.dumps(result))
    with pytest.raises(UserError, match="metrics of 2 experts together"):
        write("--metrics", metrics)


def test_metrics_of_other_weights_are_refused_and_of_unknown_ones_named(write, metrics, expert, caplog):
    result = json.loads(metrics.read_text())
    split = result["splits"]["scores"]
    assert split["made_from"] == {"tiny": read_card(expert)["weights_sha256"]}
    split["made_from"] = {"tiny": "3" * 64}
    metrics.write_text(json.dumps(result))
    with pytest.raises(
        UserError, match=r"measured with other weights .* 3{12}\.\.\., not [0-9a-f]{12}\.\.\.;"
    ):
        write("--metrics", metrics)
    del split["made_from"]
    metrics.write_text(json.dumps(result))
    logging.getLogger("featdistill").propagate = True
    try:
        text = write("--metrics", metrics, "--license", "cc-by-nc-4.0")["README.md"]
    finally:
        logging.getLogger("featdistill").propagate = False
    assert "metrics.json does not name the weights that were measured" in caplog.text
    assert "(DeLong); the file does not name the weights that were measured:" in text
    split["made_from"] = ["tiny"]
    metrics.write_text(json.dumps(result))
    with pytest.raises(UserError, match="does not hold metrics"):
        write("--metrics", metrics)


def test_a_second_dry_run_replaces_the_first_alone(expert, tmp_path):
    out = tmp_path / "look"
    command = [str(expert), "me/tiny", "--dry-run", "--out", str(out)]
    run([*command, "--calibrator", str(make_calibrator(expert, tmp_path / "own.json"))])
    run([*command, "--license", "mit"])
    assert {path.name for path in out.iterdir()} == {"README.md", "expert.json", "expert.safetensors"}
    assert "license: mit" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="already exists and was not written by this command"):
        run([str(out), *command[1:]])
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists and was not written by this command"):
        run(command)
    (out / "notes.txt").unlink()
    (out / "README.md").write_text("by hand")
    with pytest.raises(UserError, match="already exists and was not written by this command"):
        run(command)
    assert (out / "README.md").read_text() == "by hand"


def test_only_names_of_repositories_and_folders_of_experts_are_accepted(expert, tmp_path):
    with pytest.raises(UserError, match=r"^tiny does not name a repository; write OWNER/NAME$"):
        run([str(expert), "tiny"])
    wrong = r"^hub:me/tiny does not name a repository \(did you mean me/tiny\?\); write OWNER/NAME$"
    with pytest.raises(UserError, match=wrong):
        run([str(expert), "hub:me/tiny"])
    with pytest.raises(UserError, match="leave out @v1"):
        run([str(expert), "me/tiny@v1"])
    with pytest.raises(UserError, match="is not an expert: it has no"):
        run([str(tmp_path), "me/tiny"])


def test_what_is_there_is_not_replaced_without_a_word(expert, monkeypatch):
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.add("me/llm", {"model.safetensors": b"", "README.md": b"", ".gitattributes": b""})
        with pytest.raises(UserError, match="me/llm has other files and is not an expert's"):
            run([str(expert), "me/llm"])
        hub.add("me/tiny", {"expert.json": b"{}", "README.md": b"by hand"})
        with pytest.raises(UserError, match="me/tiny exists and is public; leave out --private"):
            run([str(expert), "me/tiny", "--private"])
        hub.add("me/empty", {".gitattributes": b""})
        monkeypatch.setenv("HF_TOKEN", "wrong")
        with pytest.raises(UserError, match=f"cannot push to {hub.url}/me/empty: .*401"):
            run([str(expert), "me/empty"])
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        with pytest.raises(UserError, match="nobody is logged in; set HF_TOKEN"):
            run([str(expert), "me/tiny"])
        assert not [request for request in hub.requests if "commit" in request]


def test_the_backbone_is_named_as_the_hub_names_it():
    assert base_model(BACKBONES["clip_l14"]) == "timm/vit_large_patch14_clip_224.openai"
    assert base_model(BACKBONES["dinov3_s"]) == "timm/vit_small_patch16_dinov3.lvd1689m"
    assert base_model(BACKBONES["mocov3_b"]) is None and base_model(BACKBONES["tiny_clip"]) is None
    assert base_model(resolve_spec("open_clip:ViT-B-16/laion2b_s34b_b88k")) is not None
