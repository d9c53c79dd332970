"""The study of the method on a few images, and what it refuses before anything is trained."""

import numpy as np
import pytest
from safetensors.torch import save_file

from featdistill import __main__ as tools
from featdistill.command_line import UserError
from featdistill.distortions.presets import parse_policy
from featdistill.inference.scoring import score
from featdistill.models.backbones import build, resolve_spec
from featdistill.models.expert import load_expert
from featdistill.records.manifest import read_manifest
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
    score = folder / "seed2" / "stage1" / "official" / "study_logits.npz"
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


def test_a_study_from_tokens_scores_the_test_images_as_one_from_images_does(make_set, tmp_path):
    train, val = make_set("train", 16), make_set("val", 8, first=100)
    backbone = ["--backbone", "timm:vit_tiny_patch16_224", "--weights", str(tmp_path / "weights.safetensors")]
    model = build(resolve_spec(backbone[1]))
    save_file(
        {name: value.contiguous() for name, value in model.timm_model.state_dict().items()}, backbone[3]
    )
    bank = tmp_path / "scored"
    embedded = [
        *backbone,
        "--input-size",
        "32",
        "--manifest",
        str(val),
        "--out",
        str(bank),
        "--dtype",
        "float32",
    ]
    embedded += ["--views", "3", "--draw", "evaluation", "--distortions", "official", "--workers", "0"]
    assert tools.main(["embed", *embedded, "--tokens-before-last", "2"]) == 0
    study = ["--recipe", "clip_b16", "--train", str(train), "--val", str(val), "--test", str(val)]
    study += ["--out", str(tmp_path / "study"), "--seeds", "1", "2", "--draws", "2", "--tokens", str(bank)]
    study += ["--policies", "none", "--stage2", "continued", "reading A (dense)", "reading B (crd)"]
    settings = ["backbone=timm:vit_tiny_patch16_224", f"weights={backbone[3]}", "input_size=32"]
    settings += ["epochs=1", "batch_size=8", "workers=0", "head_hidden=4", "precision=fp32"]
    settings += ["finetune=last_n", "last_n=2", "crop=center", "flip=0"]
    assert main([*study, "--set", *settings]) == 0
    run = tmp_path / "study" / "seed2" / "stage2" / "reading_B_crd"
    with np.load(run / "study_logits.npz") as stored:
        expert, rows = load_expert(run / "expert-last"), read_manifest(val)
        for draw, logits in enumerate(stored["distorted"]):
            (batch,) = score([expert], rows, policy=parse_policy("official"), seed=draw)
            np.testing.assert_allclose(logits[batch.rows], batch.logits[0], atol=1e-4)
        assert len(stored["distorted"]) == 2 and stored["clean"].shape == (1, 8)
    with pytest.raises(UserError, match="--tokens needs --set finetune=last_n"):
        main([*study, "--set", *settings, "finetune=norms_last_n"])
