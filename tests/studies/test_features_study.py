"""The study of frozen features: which it probes, and what its tables show."""

import re

import numpy as np
import pandas as pd
import pytest

from featdistill.command_line import UserError
from featdistill.evaluation.metrics import roc_auc
from featdistill.records.manifest import read_manifest, write_manifest
from studies.features import main


@pytest.fixture
def images(make_set, tmp_path):
    """Return a manifest of 32 training images in two folds and of 16 others."""
    rows = pd.concat([read_manifest(make_set("train", 32)), read_manifest(make_set("test", 16, first=100))])
    rows["part"] = ["train"] * 32 + ["test"] * 16
    rows["fold"] = [str(number % 4 // 2) for number in range(48)]
    path = tmp_path / "images.csv"
    write_manifest(rows.reset_index(drop=True), path)
    return path


def test_tables_have_the_aucs_of_the_probes_scores(images, tmp_path, capsys):
    out = tmp_path / "study"
    arguments = ["--images", str(images), "--train", "part=train", "--folds", "fold", "--out", str(out)]
    arguments += ["--backbones", "tiny_clip", "tiny_student", "--weights-files", "tiny_clip=random"]
    arguments += ["tiny_student=random", "--seeds", "2", "--draws", "2", "--workers", "0"]
    arguments += ["--precision", "fp32", "--control-side", "8", "--preset", "official"]
    assert main(arguments) == 0
    text = (out / "features.md").read_text()
    assert capsys.readouterr().out.endswith(text)
    lines = {
        (part, cells[1], cells[3]): cells
        for part in ("folds", "hold-out")
        for line in text.split(f"## tiny_clip, {part}")[1].split("##")[0].splitlines()
        if len(cells := [cell.strip() for cell in line.split("|")]) > 3
    }
    rows = read_manifest(images).set_index("name")
    probes = out / "tiny_clip" / "probes"
    hold_out = []
    for seed in (1, 2):
        for draw in (1, 2):
            scores = pd.read_csv(probes / f"both-{seed}" / "mean" / f"holdout-evaluation-{draw}.csv")
            hold_out.append(roc_auc(rows.loc[scores["name"], "label"], scores["score"]))
    shown = float(re.match(r"([\d.]+)", lines["hold-out", "mean", "both"][6])[1])
    assert shown == pytest.approx(np.mean(hold_out), abs=0.0005)
    folds = pd.read_csv(probes / "control" / "mean" / "folds-control.csv")
    folds = folds.join(rows[["label", "fold"]], on="name")
    control = np.mean([roc_auc(part["label"], part["score"]) for _, part in folds.groupby("fold")])
    shown = float(re.match(r"([\d.]+)", lines["folds", "mean", "none"][2])[1])
    assert shown == pytest.approx(control, abs=0.0005)
    assert "mean of" in text and "| probability |" in text
    assert main(arguments) == 0 and capsys.readouterr().out.endswith(text)


def test_a_condition_that_selects_nothing_is_refused(images, tmp_path):
    arguments = ["--images", str(images), "--folds", "fold", "--out", str(tmp_path / "study")]
    arguments += ["--backbones", "tiny_clip", "--weights-files", "tiny_clip=random"]
    with pytest.raises(UserError, match="part=trian selects 0 of 48 images"):
        main([*arguments, "--train", "part=trian"])
