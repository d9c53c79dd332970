"""The study of a small student: what its tables show is the AUC of what was left out."""

import re

import numpy as np
import pandas as pd
import pytest

from featdistill.bank.embed import Settings, embed
from featdistill.bank.views import ViewPlan
from featdistill.command_line import UserError
from featdistill.evaluation.metrics import roc_auc
from featdistill.inference.processes import Processes
from featdistill.recipe_groups import Augmentation
from featdistill.records.manifest import read_manifest, write_manifest
from studies.student import main


@pytest.fixture
def arguments(make_set, tmp_path):
    """Return flags: 36 training images in three folds, 12 others, and the banks of a tiny backbone."""
    rows = pd.concat([read_manifest(make_set("train", 36)), read_manifest(make_set("test", 12, first=100))])
    rows["part"] = ["train"] * 36 + ["test"] * 12
    rows["fold"] = [str(number % 6 // 2) for number in range(48)]
    rows = rows.reset_index(drop=True)
    write_manifest(rows, tmp_path / "images.csv")
    write_manifest(rows[:36], tmp_path / "train.csv")
    policy = Augmentation(distortions="official")
    for bank, manifest, draw in (("both", "train", "training"), ("scored", "images", "evaluation")):
        settings = Settings(
            backbone="tiny_clip",
            weights="random",
            features=["class", "mean"],
            views=ViewPlan(2, draw, 0, policy),
            precision="fp32",
            workers=0,
        )
        Processes().run(
            lambda processes, settings=settings, manifest=manifest, bank=bank: embed(
                settings, [tmp_path / f"{manifest}.csv"], tmp_path / bank, processes
            )
        )
    flags = ["--images", str(tmp_path / "images.csv"), "--train", "part=train", "--folds", "fold"]
    flags += ["--bank", str(tmp_path / "both"), "--score", str(tmp_path / "scored"), "--features", "class"]
    flags += ["mean", "--recipe", "demo_student", "--preset", "official", "--draws", "2", "--seeds", "1", "2"]
    flags += ["--set", "epochs=1", "batch_size=8", "workers=0", "distill_target=clean"]
    return [*flags, "--out", str(tmp_path / "study")]


def test_tables_have_the_aucs_of_what_was_left_out(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    out = tmp_path / "study"
    text = (out / "student.md").read_text()
    assert capsys.readouterr().out.endswith(text)
    lines = {
        (part, cells[1]): cells
        for part in ("folds", "hold-out")
        for line in text.split(f"## {part}")[1].split("##")[0].splitlines()
        if len(cells := [cell.strip() for cell in line.split("|")]) > 3
    }
    rows = read_manifest(tmp_path / "images.csv")
    test, folds = rows[rows["part"] == "test"], rows[rows["part"] == "train"].groupby("fold")
    for network, name in enumerate(("labels alone", "student")):
        scores = [
            np.load(out / "holdout" / f"seed{seed}" / "logits.npz")["robust"][network] for seed in (1, 2)
        ]
        aucs = [roc_auc(test["label"], drawn) for drawn in np.concatenate(scores)]
        assert _first(lines["hold-out", name][4]) == pytest.approx(np.mean(aucs), abs=0.0005)
        aucs = [
            roc_auc(part["label"], drawn)
            for fold, part in folds
            for seed in (1, 2)
            for drawn in np.load(out / f"fold{fold}" / f"seed{seed}" / "logits.npz")["clean"][network]
        ]
        assert _first(lines["folds", name][2]) == pytest.approx(np.mean(aucs), abs=0.0005)
    fused = []
    for feature in ("class", "mean"):
        scores = pd.read_csv(out / "holdout" / "teachers" / feature / "holdout-clean.csv").set_index("name")
        probability = scores.loc[test["name"], "score"].to_numpy()
        fused.append(np.log(probability / (1 - probability)))
    shown = _first(lines["hold-out", "teachers"][2])
    assert shown == pytest.approx(roc_auc(test["label"], np.mean(fused, axis=0)), abs=0.0005)
    assert main(arguments) == 0 and capsys.readouterr().out.endswith(text)


def test_no_teacher_has_seen_what_is_scored(arguments, tmp_path):
    main(arguments)
    rows = read_manifest(tmp_path / "images.csv").set_index("name")
    for fold in "012":
        folder = tmp_path / "study" / f"fold{fold}"
        taught = pd.read_csv(folder / "teachers.csv")["name"]
        assert set(rows.loc[taught, "fold"]) == set("012") - {fold}
        assert set(rows.loc[taught, "part"]) == {"train"}
        assert taught.tolist() == read_manifest(folder / "train.csv")["name"].tolist()


def test_a_fold_that_is_no_column_is_refused(arguments):
    with pytest.raises(UserError, match="--folds a column"):
        main([*arguments, "--folds", "flod"])


def _first(cell: str) -> float:
    return float(re.match(r"([\d.]+)", cell)[1])
