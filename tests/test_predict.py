import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import set_maker

import predict
from featdistill import ensemble
from featdistill.command_line import UserError
from featdistill.dataset import prepare
from featdistill.experts import create_expert, load_expert, save_expert
from featdistill.image_io import read_image
from featdistill.manifest import read_manifest
from featdistill.predictions import read_predictions, read_sidecar

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def ensemble_folder(tmp_path_factory) -> Path:
    """Two experts of different input sizes, as two finished runs of one stage."""
    root = tmp_path_factory.mktemp("project") / "runs" / "stage2"
    for seed, (name, backbone, size) in enumerate([("alpha", "tiny_clip", 48), ("beta", "tiny_siglip", 32)]):
        torch.manual_seed(seed)
        expert = create_expert(backbone, "random", input_size=size, head_hidden=8)
        with torch.no_grad():
            expert.head[3].weight.mul_(40)
        save_expert(expert.eval(), root / name / "expert", {"data": {"train": [{"path": "data/train.csv"}]}})
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


def test_probabilities_of_large_logits_do_not_tie():
    logits = np.array([-800, -30, 0, 20, 20.000002, 30], np.float32)
    found = ensemble.probabilities(logits)
    assert np.all(np.diff(found) > 0) and found[2] == 0.5 and np.all((found >= 0) & (found <= 1))
    np.testing.assert_allclose(found[1], 1 / (1 + np.exp(30.0)), rtol=1e-12)


def test_a_second_run_does_nothing_and_another_ensemble_is_refused(make_set, tmp_path, experts, capsys):
    manifest, out = make_set("val", 5), tmp_path / "val.csv"
    arguments = ["--manifest", str(manifest), "--out", str(out), "--experts"]
    run(*arguments, *experts)
    before = out.read_bytes()
    assert run(*arguments, *experts) == 0 and "nothing to do" in capsys.readouterr().out
    assert out.read_bytes() == before
    with pytest.raises(UserError, match=r"val\.csv was made otherwise: experts\.beta"):
        run(*arguments, experts[0])
    manifest.write_text(manifest.read_text().replace("00000.jpg,0", "00000.jpg,1"))
    with pytest.raises(UserError, match=r"manifest\.sha256"):
        run(*arguments, *experts)


def test_a_file_of_someone_else_is_not_written_over(make_set, tmp_path, experts):
    (tmp_path / "val.csv").write_text("mine")
    with pytest.raises(UserError, match=r"val\.csv exists and was not made by this command"):
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
    with pytest.raises(UserError, match="empty holds no images"):
        run("--images", "empty", "--experts", *experts)
    with pytest.raises(UserError, match="no trained expert below runs/"):
        run("--split", "val")
    with pytest.raises(UserError, match=r"empty is no expert: it has no expert\.json"):
        run("--manifest", str(make_set("val", 2)), "--experts", "empty")
    with pytest.raises(UserError, match=r"one of the arguments .* is required"):
        run("--experts", *experts)


def test_a_killed_run_continues_to_the_same_bytes(tmp_path, experts):
    manifest = set_maker(tmp_path)("val", 240)
    arguments = ["--manifest", str(manifest), "--experts", *experts]
    run(*arguments, "--out", str(tmp_path / "whole.csv"))
    out = tmp_path / "killed.csv"
    command = [sys.executable, str(ROOT / "predict.py"), *arguments, "--out", str(out), "--workers", "0"]
    process = subprocess.Popen(
        [*command, "--batch-size", "4", "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    partial, deadline = tmp_path / ".killed.csv.partial", time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if partial.is_file() and partial.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.is_file()
    # What a kill in the middle of a line leaves.
    with partial.open("ab") as file:
        file.write(b"[7, [28, 29")
    assert run(*arguments, "--out", str(out)) == 0
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not partial.exists()


def test_scores_under_way_for_another_ensemble_are_not_continued(tmp_path):
    path = tmp_path / "partial"
    batch = ensemble.ScoredBatch(0, [0, 1], np.array([[1.5, -2.25]], np.float32), [])
    ensemble.PartialScores(path, {"experts": "a"}).append(batch)
    again = ensemble.PartialScores(path, {"experts": "a"}).batches
    assert len(again) == 1 and again[0].logits.tolist() == [[1.5, -2.25]] and again[0].rows == [0, 1]
    assert ensemble.PartialScores(path, {"experts": "b"}).batches == []
