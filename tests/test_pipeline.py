"""The whole pipeline on the smallest demo: archives, manifests, both stages, predictions, zip, scores."""

import csv
import io
import json
import zipfile

import pytest

import distill
import evaluate
import make_submission
import predict
import train
from data_prep import demo, ntire
from featdistill.records.manifest import read_manifest


def test_the_pipeline_leads_from_archives_to_a_checked_zip_and_scores(tmp_path, capsys):
    archives, data, runs = tmp_path / "archives", tmp_path / "data", tmp_path / "runs"
    assert demo.main(["--out", str(archives), "--size", "tiny", "--workers", "1"]) == 0
    assert ntire.main(["--root", str(archives), "--out", str(data), "--holdout", "0.25"]) == 0
    rows = ["--train", str(data / "train.csv"), "--val", str(data / "holdout.csv")]
    for recipe in ("demo_clip_a", "demo_siglip_a"):
        small = ["--recipe", recipe, "--epochs", "1", "--batch-size", "12", "--workers", "0", *rows]
        assert train.main([*small, "--out", str(runs / "stage1" / recipe)]) == 0
        teacher = str(runs / "stage1" / recipe / "expert-last")
        assert distill.main([*small, "--teacher", teacher, "--out", str(runs / "stage2" / recipe)]) == 0

    splits = ["val", "val_hard", "private_test"]
    experts = [str(runs / "stage2" / recipe / "expert") for recipe in ("demo_clip_a", "demo_siglip_a")]
    manifests = [str(data / f"{split}.csv") for split in splits]
    out = runs / "predictions"
    scored = ["--manifest", *manifests, "--experts", *experts, "--out", str(out), "--workers", "0"]
    assert predict.main(scored) == 0

    archive = tmp_path / "submission.zip"
    files = ["--val", str(out / "val.csv"), "--val-hard", str(out / "val_hard.csv")]
    assert make_submission.main(["--profile", "val", *files, "--out", str(archive)]) == 0
    assert make_submission.main(["--check", str(archive), "--profile", "val"]) == 0
    with zipfile.ZipFile(archive) as members:
        assert members.namelist() == ["submission.csv", "submission_hard.csv"]
        written = list(csv.reader(io.StringIO(members.read("submission.csv").decode())))
    predicted = list(csv.reader((out / "val.csv").open()))
    assert written[0] == ["image_name", "score"]
    assert written[1:] == [row[:2] for row in predicted[1:]]
    assert [row[0] for row in written[1:]] == read_manifest(data / "val.csv")["name"].tolist()

    labels = [*manifests[:2], str(archives / "organisers" / "private_test_labels.csv")]
    predictions = [str(out / f"{split}.csv") for split in splits]
    scores = tmp_path / "scores"
    capsys.readouterr()
    assert evaluate.main(["--predictions", *predictions, "--labels", *labels, "--out", str(scores)]) == 0
    metrics = json.loads((scores / "metrics.json").read_text())
    assert metrics["splits"]["private_test"]["images"] == 12
    for name, value in metrics["splits"]["val"]["experts"]["mean"].items():
        single = [expert[name] for expert in metrics["splits"]["val"]["experts"]["experts"].values()]
        assert value == pytest.approx(sum(single) / 2)
    assert f"{metrics['robust_auc']:.4f}" in capsys.readouterr().out
