"""The study of the method on a few images, and what it refuses before anything is trained."""

import pytest

from featdistill.command_line import UserError
from studies.method import main


@pytest.fixture
def study(make_set, tmp_path):
    """Return a function that runs a study of one variant per part in `tmp_path / "study"`."""
    train, val = make_set("train", 16), make_set("val", 8, distorted=True, first=100)
    common = ["--recipe", "demo_clip_a", "--train", str(train), "--val", str(val), "--test", str(val)]
    common += ["--preset", "official", "--out", str(tmp_path / "study"), "--stage2"]
    common += ["--set", "epochs=1", "batch_size=8", "workers=0", "input_size=32", "head_hidden=4"]
    return lambda *more: main([*common, *more])


def test_a_study_compares_variants_over_seeds_and_keeps_what_is_finished(study, tmp_path, read_rows, capsys):
    arguments = ["--seeds", "1", "2", "--policies", "none", "official"]
    assert study(*arguments) == 0
    folder = tmp_path / "study"
    rows = read_rows(folder / "study.csv")
    assert rows[["part", "variant", "seed"]].to_numpy().tolist() == [
        ["stage 1", variant, seed] for seed in ("1", "2") for variant in ("none", "official")
    ]
    text = (folder / "study.md").read_text()
    assert "against none" in text and "official" in text and " to " in text
    score = folder / "seed2" / "stage1" / "official" / "study_score.json"
    before = score.stat().st_mtime_ns
    capsys.readouterr()
    assert study(*arguments) == 0
    assert score.stat().st_mtime_ns == before and capsys.readouterr().out.endswith(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1", "1"], "two different seeds"),
        (["--policies", "offical"], "invalid choice: 'offical'"),
        # The command ends with the values of --set.
        (["epochs"], "not of the form KEY=VALUE"),
        (["epoch=1"], "did you mean --epochs"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_trained(study, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        study(*flags)
    assert not (tmp_path / "study").exists()
