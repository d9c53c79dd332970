import pytest

from featdistill.command_line import UserError
from studies.backbones import TABLE_2, main


@pytest.fixture
def study(make_set, tmp_path):
    """Return a function that runs a study of a few seconds in `tmp_path / "study"`."""
    train, val = make_set("train", 24), make_set("val", 12, distorted=True, first=100)
    common = ["--recipe", "demo_clip_a", "--train", str(train), "--val", str(val)]
    common += ["--out", str(tmp_path / "study"), "--input-size", "32", "--epochs", "1", "--batch-size", "8"]
    common += ["--workers", "0", "--head-hidden", "4"]
    return lambda *more: main([*common, *more])


def test_a_study_compares_with_the_paper_continues_after_a_failure_and_leaves_finished_runs_alone(
    study, tmp_path, read_rows, capsys
):
    folder = tmp_path / "study"
    two = ["--backbones", "timm:test_vit", "timm:test_convnext"]
    missing = ["--weights-files", f"timm:test_vit={tmp_path / 'nowhere.pth'}"]
    assert study(*two, *missing) == 1
    table = read_rows(folder / "table.csv").set_index("backbone")
    assert list(table.index) == [*TABLE_2, "timm:test_vit", "timm:test_convnext"]
    failed, done = table.loc["timm:test_vit"], table.loc["timm:test_convnext"]
    assert "nowhere.pth does not exist" in failed["note"] and failed["robust_auc"] == ""
    assert done["note"] == "" and float(done["parameters_m"]) == 0.2 and float(done["images_per_s"]) > 0
    assert 0 <= float(done["clean_auc"]) <= 1 and 0 <= float(done["robust_auc"]) <= 1
    paper = table.loc["clip_l14"]
    assert [paper["paper_stage1_robust_auc"], paper["paper_stage2_robust_auc"]] == ["0.8926", "0.934"]
    assert paper["robust_auc"] == "" and paper["note"] == "not trained here"

    card = folder / "timm_test_convnext" / "expert" / "expert.json"
    before = card.stat().st_mtime_ns
    capsys.readouterr()
    assert study(*two) == 0
    printed = capsys.readouterr().out
    assert card.stat().st_mtime_ns == before and "test_convnext at 32 px" not in printed
    assert printed.endswith((folder / "table.md").read_text())
    again = read_rows(folder / "table.csv").set_index("backbone")
    assert again.loc["timm:test_convnext"].equals(done) and again.loc["timm:test_vit"]["note"] == ""

    assert study(*two, "--learning-rate", "0.5") == 1
    note = read_rows(folder / "table.csv").set_index("backbone").loc["timm:test_vit"]["note"]
    assert "learning_rate was 0.001, is 0.5" in note and "another --out" in note


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backbones", "swin_x"], "did you mean swin_t"),
        (["--backbone", "swin_t"], "use --backbones"),
        (["--backbones", "swin_t", "--weights-files", "swin_t"], "not of the form NAME=FILE"),
        (["--backbones", "swin_t", "--weights-files", "swin_b=x.pth"], "did you mean swin_t"),
        (["--epoch", "3"], "did you mean --epochs"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_trained(study, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        study(*flags)
    assert not (tmp_path / "study").exists()


def test_a_study_probes_frozen_backbones_and_shows_each_feature(study, tmp_path, read_rows, capsys):
    folder = tmp_path / "study"
    flags = ["--backbones", "timm:test_vit", "--probe-views", "2", "--probe", "pool", "mean:1,2"]
    assert study(*flags) == 0
    table = read_rows(folder / "table.csv").set_index("backbone")
    rows = table.loc[["timm:test_vit"]]
    assert list(rows["feature"]) == ["pool", "mean:1,2"] and (rows["note"] == "").all()
    probed = read_rows(folder / "timm_test_vit" / "probe" / "probe.csv")
    assert list(probed["part"]) == ["holdout", "holdout"]
    for key in ("clean_auc", "robust_auc"):
        assert list(rows[key]) == list(probed[key]) and (rows[key].astype(float) >= 0).all()
    assert (rows["images_per_s"].astype(float) > 0).all() and (rows["parameters_m"] == "0.3").all()
    assert "views embedded/s" in (folder / "table.md").read_text()
    bank = folder / "timm_test_vit" / "train" / "bank.json"
    before = bank.stat().st_mtime_ns
    assert study(*flags, "mean:3") == 1
    note = read_rows(folder / "table.csv").set_index("backbone").loc["timm:test_vit"]["note"]
    assert "was produced with different settings" in note
    assert bank.stat().st_mtime_ns == before
