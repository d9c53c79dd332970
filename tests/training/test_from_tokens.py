"""A run from kept tokens ends like one from images, and is refused where it could not."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from training_runs import SMALL_STAGE_2, losses

import distill
import train
from featdistill.__main__ import main
from featdistill.command_line import UserError
from featdistill.models.expert import read_card
from featdistill.records.manifest import read_manifest, write_manifest

# A transformer of six blocks with class token, and no BatchNorm in the part that is trained.
VIT = ["--backbone", "timm:test_vit", "--input-size", "64"]
FIXED = ["--distortions", "official,keeps_layout_only=true", "--crop", "center", "--flip", "0"]
LAST_TWO = [*SMALL_STAGE_2, "--precision", "fp32", "--finetune", "last_n", "--last-n", "2", "--seed", "0"]
RUN = [*LAST_TWO, *VIT, "--weights", "random", "--resize", "shorter"]


def embed(out: Path, manifest: str, *more: str) -> str:
    arguments = ["embed", *VIT, "--weights", "random", "--manifest", manifest, "--out", str(out)]
    arguments += ["--tokens-before-last", "3", "--dtype", "float32", "--precision", "fp32", "--workers", "0"]
    assert main([*arguments, "--batch-size", "8", *more]) in (0, None)
    return str(out)


@pytest.fixture(scope="module")
def banks(sets, tmp_path_factory) -> dict[str, str]:
    """Banks of the training set: crops and mirroring, views in place for both stages; and of the hold-out."""
    root = tmp_path_factory.mktemp("banks")
    return {
        "drawn": embed(root / "drawn", sets[1], "--views", "3", "--distortions", "official"),
        "clean": embed(root / "clean", sets[1]),
        "fixed": embed(root / "fixed", sets[1], "--views", "3", *FIXED),
        "second": embed(root / "second", sets[1], "--views", "3", *FIXED, "--stage", "2"),
        "val": embed(
            root / "val", sets[3], "--views", "2", "--distortions", "official", "--draw", "evaluation"
        ),
    }


@pytest.fixture(scope="module")
def teacher(sets, banks, tmp_path_factory) -> str:
    run = tmp_path_factory.mktemp("teacher") / "run"
    train.main([*RUN, *sets, *FIXED, "--epochs", "1", "--tokens", banks["fixed"], "--out", str(run)])
    return str(run / "expert-last")


def assert_alike(run: Path, other: Path) -> None:
    """Weights and losses agree to 1e-4, and something was trained."""
    one, two = (
        safetensors.numpy.load_file(path / "expert-last" / "expert.safetensors") for path in (run, other)
    )
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_allclose(values, two[name], rtol=1e-4, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(losses(run), losses(other), rtol=1e-4)
    scores = [read_card(path / "expert-last")["metrics"]["holdout"] for path in (run, other)]
    assert scores[0] == pytest.approx(scores[1])


@pytest.mark.parametrize("feature", ["pool", "layers:4,5,6", "top_tokens:3"])
def test_stage_1_from_tokens_ends_with_the_weights_of_a_run_from_images(feature, sets, banks, tmp_path):
    arguments = [*RUN, *sets, "--distortions", "official", "--feature", feature, "--learning-rate", "1e-3"]
    train.main([*arguments, "--out", str(tmp_path / "images")])
    tokens = ["--tokens", banks["drawn"], "--val-tokens", banks["val"]]
    train.main([*arguments, *tokens, "--out", str(tmp_path / "tokens")])
    assert_alike(tmp_path / "tokens", tmp_path / "images")
    assert (tmp_path / "tokens" / "top_tokens.json").exists() == feature.startswith("top")


def test_adapters_in_the_last_layers_are_trained_from_tokens_as_well(sets, banks, tmp_path):
    pytest.importorskip("peft")
    arguments = [*RUN, *sets, "--distortions", "official", "--epochs", "1", "--learning-rate", "1e-3"]
    at = arguments.index("last_n")
    arguments[at : at + 3] = ["lora", "--lora-last-n", "2", "--lora-rank", "2"]
    train.main([*arguments, "--out", str(tmp_path / "images")])
    train.main([*arguments, "--tokens", banks["drawn"], "--out", str(tmp_path / "tokens")])
    assert_alike(tmp_path / "tokens", tmp_path / "images")


@pytest.mark.parametrize(
    "own",
    [
        ["--objective", "dense", "--dense-layers", "2"],
        ["--objective", "crd", "--teacher-view", "clean", "--teacher-kind", "momentum", "--crd-queue", "24"],
        ["--consistency-weight", "1", "--teacher-view", "same"],
    ],
    ids=["dense", "crd", "consistency"],
)
def test_stage_2_from_tokens_ends_with_the_weights_of_a_run_from_images(own, sets, banks, teacher, tmp_path):
    arguments = [*LAST_TWO, *sets, *FIXED, *own, "--teacher", teacher, "--learning-rate", "1e-3"]
    distill.main([*arguments, "--out", str(tmp_path / "images")])
    distill.main([*arguments, "--tokens", banks["second"], "--out", str(tmp_path / "tokens")])
    assert_alike(tmp_path / "tokens", tmp_path / "images")


def test_random_masks_drop_kept_tokens_and_a_run_goes_on(sets, banks, tmp_path, capsys):
    arguments = [*RUN, *sets, "--distortions", "official", "--tokens", banks["drawn"]]
    masked = ["--mask", "random", "--mask-level", "token", "--mask-ratio", "0.5", "--epochs", "3"]
    train.main([*arguments, "--epochs", "3", "--out", str(tmp_path / "whole")])
    train.main([*arguments, *masked, "--out", str(tmp_path / "masked")])
    assert "epochs from 3 on show the 2 views again" in capsys.readouterr().out
    assert losses(tmp_path / "masked")[0][1] != losses(tmp_path / "whole")[0][1]
    assert train.main([*arguments, *masked, "--out", str(tmp_path / "masked")]) == 0
    with pytest.raises(UserError, match=r"produced with different settings"):
        train.main(
            [*RUN, *sets, *FIXED, "--tokens", banks["fixed"], *masked, "--out", str(tmp_path / "masked")]
        )


def test_some_rows_of_a_bank_can_be_trained_on_and_unreadable_ones_are_listed(sets, tmp_path, make_set):
    manifest = make_set("more", 24, first=500)
    rows = read_manifest(manifest)
    Path(rows["image"][3]).write_bytes(b"no image")
    bank = tmp_path / "bank"
    assert main(["embed", *VIT, "--weights", "random", "--manifest", str(manifest), "--out", str(bank),
                 "--tokens-before-last", "2", "--workers", "0"]) == 1  # fmt: skip
    write_manifest(rows[:20], tmp_path / "part.csv")
    data = ["--train", str(tmp_path / "part.csv"), *sets[2:], "--epochs", "1", "--tokens", str(bank)]
    still = ["--distortions", "none", "--crop", "center", "--flip", "0"]
    assert train.main([*RUN, *data, *still, "--out", str(tmp_path / "run")]) == 1
    assert "could not be read when" in (tmp_path / "run" / "unreadable.csv").read_text()
    with pytest.raises(UserError, match=r"no views but the clean one; embed with --views"):
        train.main([*RUN, *data, "--out", str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("bank", "changes", "message"),
    [
        (
            "drawn",
            ["--backbone", "tiny_clip"],
            "of another expert: library is timm in the bank and tiny in the run",
        ),
        ("drawn", ["--input-size", "32"], "input_size is 64 in the bank and 32 in the run"),
        ("drawn", ["--resize", "squash"], "resize is shorter in the bank and squash in the run"),
        ("drawn", ["--seed", "1"], "other settings: seed is 0 in the bank and 1 in the run"),
        (
            "clean",
            ["--distortions", "none", "--crop", "center", "--flip", "0", "--seed", "1"],
            "first 3 layers differ from those of the run; the bank has the random weights of a run with "
            "--weights random --seed 0",
        ),
        ("drawn", ["--last-n", "4"], "the last 3 blocks receive, and the run trains 4; use --last-n 3"),
        (
            "drawn",
            ["--finetune", "norms_last_n"],
            "norms_last_n trains earlier layers; use",
        ),
        ("drawn", ["--feature", "layers:2,6"], "reads layer 2, and the tokens are those after 3"),
        ("drawn", ["--crop", "center"], "other settings: crop is random in the bank and center in the run"),
        (
            "drawn",
            ["--distortions", "none"],
            "its distortions are official, those of the run none; embed with",
        ),
        ("drawn", ["--amplitude-mixup", "0.5"], "amplitude_mixup needs images"),
        (
            "drawn",
            ["--mask", "texture", "--mask-level", "token"],
            "masks of pixels and by texture need images",
        ),
        ("drawn", ["--mask", "random"], "masks of pixels and by texture need images"),
        ("val", [], "40 of 40 rows are not in the bank"),
    ],
)
def test_a_bank_that_does_not_fit_is_one_clear_error(bank, changes, message, sets, banks, tmp_path):
    arguments = [*RUN, *sets, "--distortions", "official", "--tokens", banks[bank]]
    with pytest.raises(UserError, match=message):
        train.main([*arguments, *changes, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_bank_that_does_not_fit_stage_2_is_one_clear_error(sets, banks, teacher, tmp_path):
    arguments = [*LAST_TWO, *sets, "--teacher", teacher, "--out", str(tmp_path / "run"), "--tokens"]
    with pytest.raises(UserError, match=r"embed with --distortions official,keeps_layout_only=true"):
        distill.main([*arguments, banks["drawn"], "--distortions", "official"])
    with pytest.raises(UserError, match=r"dense_layers 5 reads layers before 3"):
        distill.main([*arguments, banks["fixed"], *FIXED, "--dense-layers", "5"])
    with pytest.raises(UserError, match=r"--val-tokens .*embed with --draw evaluation"):
        distill.main([*arguments, banks["fixed"], *FIXED, "--val-tokens", banks["fixed"]])
    with pytest.raises(UserError, match=r"--tokens .* is not a bank"):
        distill.main([*arguments, str(tmp_path)])
    record = json.loads((Path(banks["second"]) / "bank.json").read_text())
    assert record["views"]["stage"] == 2 and len(record["weights"]["layers"]) == 8
