import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_experts import save_tiny_pair

import predict
from featdistill.command_line import UserError
from featdistill.data.preprocessing import prepare
from featdistill.images.reading import read_image
from featdistill.inference import predictor
from featdistill.inference.fusion import FORMAT_VERSION, Fusion
from featdistill.models.expert import load_expert
from featdistill.records.manifest import read_manifest
from featdistill.records.predictions import read_predictions, read_sidecar


@pytest.fixture(scope="module")
def ensemble_folder(tmp_path_factory) -> Path:
    """Two experts of different input sizes, as two finished runs of one stage."""
    root = tmp_path_factory.mktemp("project") / "runs" / "stage2"
    save_tiny_pair(root, {"data": {"train": [{"path": "data/train.csv"}]}})
    return root


@pytest.fixture
def experts(ensemble_folder) -> list[str]:
    return [str(ensemble_folder / name / "expert") for name in ("alpha", "beta")]


def run(*arguments: str) -> int:
    return predict.main([*arguments, "--workers", "0", "--batch-size", "4", "--device", "cpu"])


def test_the_score_is_the_mean_of_the_experts_probabilities(make_set, tmp_path, experts):
    manifest, out = make_set("val", 6), tmp_path / "val.csv"
    assert run("--manifest", str(manifest), "--experts", *experts, "--out", str(out)) == 0
    found, rows = read_predictions(out), read_manifest(manifest)
    assert found["name"].tolist() == rows["name"].tolist()
    for name, folder in zip(("alpha", "beta"), experts, strict=True):
        expert = load_expert(folder)
        with torch.no_grad():
            images = [prepare(read_image(path), *expert.preprocessing.key) for path in rows["image"]]
            expected = expert(torch.stack(images)).double().sigmoid().numpy()
        np.testing.assert_allclose(found[name], expected, atol=2e-5)
    np.testing.assert_allclose(found["score"], (found["alpha"] + found["beta"]) / 2, atol=1e-15)
    assert found["score"].nunique() == 6


def test_a_second_run_does_nothing_and_another_ensemble_is_refused(make_set, tmp_path, experts, capsys):
    manifest, out = make_set("val", 5), tmp_path / "val.csv"
    arguments = ["--manifest", str(manifest), "--out", str(out), "--experts"]
    run(*arguments, *experts)
    before = out.read_bytes()
    assert run(*arguments, *experts) == 0 and "nothing to do" in capsys.readouterr().out
    assert out.read_bytes() == before
    with pytest.raises(UserError, match=r"val\.csv was produced with different settings: experts\.beta"):
        run(*arguments, experts[0])
    manifest.write_text(manifest.read_text().replace("00000.jpg,0", "00000.jpg,1"))
    with pytest.raises(UserError, match=r"manifest\.sha256"):
        run(*arguments, *experts)


def test_a_file_of_someone_else_is_not_written_over(make_set, tmp_path, experts):
    (tmp_path / "val.csv").write_text("mine")
    with pytest.raises(UserError, match=r"val\.csv already exists and was not written by this command"):
        run("--manifest", str(make_set("val", 2)), "--experts", *experts, "--out", str(tmp_path / "val.csv"))
    assert (tmp_path / "val.csv").read_text() == "mine"


def test_a_broken_image_is_named_and_the_rest_goes_on(make_set, tmp_path, experts, capsys):
    manifest, out = make_set("val", 9), tmp_path / "val.csv"
    whole = tmp_path / "whole.csv"
    run("--manifest", str(manifest), "--experts", *experts, "--out", str(whole))
    truncated, missing = manifest.parent / "00002.jpg", manifest.parent / "00005.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-400])
    missing.unlink()
    assert run("--manifest", str(manifest), "--experts", *experts, "--out", str(out)) == 1
    found, expected = read_predictions(out), read_predictions(whole)
    kept = ~expected["name"].isin(["00002.jpg", "00005.jpg"])
    assert found["name"].tolist() == expected["name"][kept].tolist()
    np.testing.assert_allclose(found["score"], expected["score"][kept], atol=1e-6)
    errors = (tmp_path / "val.errors.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in errors] == ["name", "00002.jpg", "00005.jpg"]
    assert "00002.jpg" in capsys.readouterr().out
    assert run("--manifest", str(manifest), "--experts", *experts, "--out", str(out)) == 1


def test_the_last_runs_experts_and_manifest_are_the_default(make_set, ensemble_folder, tmp_path, monkeypatch):
    project = tmp_path / "project"
    shutil.copytree(ensemble_folder.parent.parent, project)
    manifest = make_set("data", 5)
    (project / "data").mkdir()
    shutil.copy(manifest, project / "data" / "private_test.csv")
    for image in manifest.parent.glob("*.jpg"):
        shutil.copy(image, project / "data")
    monkeypatch.chdir(project)
    assert run("--split", "private_test") == 0
    out = project / "runs" / "predictions" / "private_test.csv"
    assert list(read_predictions(out)) == ["name", "score", "alpha", "beta"]
    assert sorted(read_sidecar(out)["experts"]) == ["alpha", "beta"]
    with pytest.raises(UserError, match=r"no manifest data/privat_test\.csv \(did you mean private_test\?\)"):
        run("--split", "privat_test")


def test_a_folder_of_images_is_scored_with_its_subfolders(make_set, tmp_path, experts):
    manifest = make_set("val", 4)
    nested = manifest.parent / "more"
    nested.mkdir()
    shutil.move(manifest.parent / "00003.jpg", nested / "00003.jpg")
    run("--images", str(manifest.parent), "--experts", *experts, "--out", str(tmp_path / "scores.csv"))
    names = read_predictions(tmp_path / "scores.csv")["name"].tolist()
    assert names == ["00000.jpg", "00001.jpg", "00002.jpg", "more/00003.jpg"]


def test_what_is_not_there_is_one_clear_error(make_set, tmp_path, experts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty contains no images"):
        run("--images", "empty", "--experts", *experts)
    with pytest.raises(UserError, match="no trained expert below runs/"):
        run("--split", "val")
    with pytest.raises(UserError, match=r"empty is not an expert: it has no expert\.json"):
        run("--manifest", str(make_set("val", 2)), "--experts", "empty")
    with pytest.raises(UserError, match=r"nothing to score"):
        run("--experts", *experts)


def test_a_few_images_make_a_table_and_no_file(make_set, tmp_path, experts, capsys, monkeypatch):
    images = sorted(str(path) for path in make_set("val", 3).parent.glob("*.jpg"))
    monkeypatch.chdir(tmp_path)
    run("--manifest", "val/manifest.csv", "--experts", *experts, "--out", "val.csv")
    expected, before = read_predictions("val.csv"), sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    Path(images[1]).write_text("no image")
    assert run(*images, "nowhere.png", "--experts", *experts) == 1
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["image", "P(AI)", "alpha", "beta"]
    for line, row in ((table[1], 0), (table[3], 2)):
        name, *shown = line.split()
        assert name == images[row]
        wanted = expected.loc[row, ["score", "alpha", "beta"]].to_numpy(dtype=float)
        np.testing.assert_allclose([float(value) for value in shown], wanted, atol=1e-4)
    assert "could not be read" in table[2] and "could not be read" in table[4] and "nowhere.png" in table[4]
    assert any("alpha" in line and "tiny:clip at 48 px" in line for line in table[5:])
    assert sorted(tmp_path.rglob("*")) == before


def test_json_says_the_same_and_nothing_else(make_set, experts, capsys):
    image = str(make_set("val", 1).parent / "00000.jpg")
    assert run(image, "gone.jpg", "--experts", *experts, "--json", "--fusion", "logit_mean") == 1
    found = json.loads(capsys.readouterr().out)
    good, broken = found["images"]
    assert good["name"] == image and "FileNotFoundError" in broken["error"] and "score" not in broken
    logits = [np.log(p / (1 - p)) for p in good["experts"].values()]
    assert good["score"] == pytest.approx(1 / (1 + np.exp(-np.mean(logits))), abs=1e-12)
    assert list(found["experts"]) == ["alpha", "beta"] and found["fusion"] == "logit_mean"
    with pytest.raises(UserError, match="--json is for images given one by one"):
        run(image, "--json", "--out", "scores.csv", "--experts", *experts)


def test_images_given_one_by_one_can_go_to_a_file(make_set, tmp_path, experts):
    images = [str(path) for path in sorted(make_set("val", 2).parent.glob("*.jpg"))]
    assert run(*images, images[0], "--experts", *experts, "--out", str(tmp_path / "few.csv")) == 0
    assert read_predictions(tmp_path / "few.csv")["name"].tolist() == images


def test_every_choice_stands_in_the_sidecar_and_changes_the_scores(make_set, tmp_path, experts):
    arguments = ["--manifest", str(make_set("val", 5)), "--experts", *experts]
    choices = {
        "plain": [],
        "weights": ["--weights", "alpha=3,beta=1"],
        "tta": ["--tta", "five_crop+hflip"],
        "resize": ["--resize", "squash"],
        "precision": ["--precision", "bf16"],
    }
    scores, sidecars = {}, {}
    for name, further in choices.items():
        out = tmp_path / f"{name}.csv"
        assert run(*arguments, *further, "--out", str(out)) == 0
        scores[name], sidecars[name] = read_predictions(out), read_sidecar(out)
    plain = sidecars["plain"]
    assert plain["fusion"] == "probability_mean" and plain["tta"] == "none" and plain["compile"] is False
    for name, key in (("weights", "fusion"), ("tta", "tta"), ("resize", "preprocessing"), ("precision",) * 2):
        changed = {k for k in plain if plain[k] != sidecars[name][k]}
        assert changed == {key} and not np.allclose(
            scores[name]["score"], scores["plain"]["score"], atol=1e-9
        )
    assert sidecars["weights"]["fusion"]["weights"] == {"alpha": 0.75, "beta": 0.25}
    assert sidecars["tta"]["tta"] == "hflip+five_crop"
    weighted = 0.75 * scores["weights"]["alpha"] + 0.25 * scores["weights"]["beta"]
    np.testing.assert_allclose(scores["weights"]["score"], weighted, atol=1e-15)


def test_the_authors_experts_can_be_taken_as_they_are(shared, tmp_path, capsys):
    folder = shared / "golden" / "released_experts"
    image = next((shared / "pool").rglob("*.jpg"))
    assert run(str(image), "--released", str(folder), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["experts"]) == 2 and 0 < found["images"][0]["score"] < 1
    with pytest.raises(
        UserError, match="published and downloaded experts do not record where the splits are"
    ):
        run("--split", "val", "--released", str(folder))


def test_a_suffix_in_capitals_is_a_file_too(make_set, tmp_path, experts):
    arguments = ["--manifest", str(make_set("val", 4)), "--experts", *experts, "--device", "cpu"]
    assert predict.main([*arguments, "--workers", "0", "--out", str(tmp_path / "scores.CSV")]) == 0
    assert len(read_predictions(tmp_path / "scores.CSV")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8"], "precision fp8 needs a GPU of compute capability 8.9"),
        (["--precision", "fp16"], "precision fp16 needs a GPU"),
        (["--batch-size", "0"], "--batch-size must be a number above 0 or auto"),
        (["--tta", "flip"], "unknown test-time augmentation 'flip'"),
        (["--weights", "alpha=1"], "no weight for expert beta"),
        (["--device", "gpu"], "--device gpu is not a device"),
        (["--device", "mps"], "--device mps is not available on this machine"),
        (["--device", "meta"], "--device meta is not available on this machine"),
        (["--out", "scores.txt"], "--out scores.txt must be a .csv file or a folder"),
    ],
)
def test_a_choice_that_cannot_be_is_one_clear_error(arguments, message, experts):
    with pytest.raises(UserError, match=message):
        predict.main(["x.jpg", "--device", "cpu", "--experts", *experts, *arguments])


def test_weights_of_a_fusion_file_are_not_replaced(experts, tmp_path):
    path = tmp_path / "fusion.json"
    described = Fusion("logit_mean", {"alpha": 0.4, "beta": 0.6}).describe()
    path.write_text(json.dumps({"version": FORMAT_VERSION, **described}))
    arguments = ["x.jpg", "--device", "cpu", "--experts", *experts, "--fusion", str(path)]
    with pytest.raises(UserError, match="the file of --fusion has weights already; leave out --weights"):
        predict.main([*arguments, "--weights", "alpha=1,beta=1"])


def test_recorded_batch_size_is_kept_where_the_run_leaves_it_open(make_set, tmp_path, experts, monkeypatch):
    """As on a GPU, where `auto` would estimate another number each time."""
    open_size = lambda asked, device: None if asked == "auto" else int(asked)  # noqa: E731
    monkeypatch.setattr(predictor, "_batch_size", open_size)
    arguments = ["--manifest", str(make_set("val", 7)), "--experts", *experts, "--device", "cpu"]
    arguments += ["--workers", "0", "--out", str(tmp_path / "val.csv")]
    predict.main([*arguments, "--batch-size", "3"])
    whole = (tmp_path / "val.csv").read_bytes()
    assert predict.main(arguments) == 0 and (tmp_path / "val.csv").read_bytes() == whole
    # Under way: the batch size of the journal counts.
    sidecar = read_sidecar(tmp_path / "val.csv")
    (tmp_path / "val.csv").unlink()
    (tmp_path / "val.csv.json").unlink()
    (tmp_path / ".val.csv.partial").write_text(json.dumps(sidecar, sort_keys=True) + "\n")
    assert predict.main(arguments) == 0
    assert read_sidecar(tmp_path / "val.csv")["batch_size"] == 3
    assert (tmp_path / "val.csv").read_bytes() == whole


def test_fp8_is_taken_only_where_it_moves_no_score_too_far(make_set, experts, monkeypatch):
    """The decision alone, which needs no hardware: on a CPU a layer of 8 bits is only slow."""
    monkeypatch.setattr(predictor, "require_float8", lambda device: None)
    rows = read_manifest(make_set("val", 6))
    loaded = {name: load_expert(folder) for name, folder in zip(("alpha", "beta"), experts, strict=True)}
    hashes, cpu = dict.fromkeys(loaded, "0" * 64), torch.device("cpu")
    ready = predictor.Predictor(loaded, hashes, Fusion(), cpu, "fp8", 4, 0)
    try:
        moved = ready.float8_shift(rows)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this PyTorch has no 8-bit products on a CPU: {error}")
    assert 0 < moved < 0.5
    for most, expected in ((moved * 0.99, "bf16"), (moved * 1.01, "fp8")):
        monkeypatch.setattr(predictor, "_MAX_FLOAT8_SHIFT", most)
        assert ready.decide(rows) == {"precision": expected, "batch_size": 4}
    # A continued run goes by what was settled, whichever it was; another precision is another run.
    for known in ("bf16", "fp8", "fp32"):
        settled = ready.settle(ready.sidecar(), {"precision": known})["precision"]
        assert settled == ("bf16" if known == "bf16" else "fp8")


def test_nothing_to_score_and_images_behind_the_experts_are_said(tmp_path):
    with pytest.raises(UserError, match="nothing to score"):
        predict.main(["--experts", str(tmp_path)])
    image = tmp_path / "a.png"
    image.write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.png is a file; put images before --experts"):
        predict.main(["--experts", str(tmp_path), str(image)])
