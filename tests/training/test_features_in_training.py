"""Features other than the backbone's default through both stages, resuming, and several processes."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from processes import fork, needs_fork, statuses
from training_runs import SMALL, SMALL_STAGE_2, losses, weights

import distill
import predict
import train
from featdistill.command_line import UserError
from featdistill.data.loading import ScoreDataset
from featdistill.models.expert import create_expert, load_expert, read_card
from featdistill.models.features import fisher_scores, top_positions
from featdistill.records.manifest import read_manifest


def test_both_stages_and_predict_take_a_feature_of_several_layers(sets, tmp_path):
    plain = [*SMALL, *sets, "--epochs", "1", "--resize", "squash"]
    train.main([*plain, "--feature", "layers:1,2", "--out", str(tmp_path / "first")])
    teacher = tmp_path / "first" / "expert-last"
    expert = load_expert(teacher)
    assert expert.feature_dim == 2 * 96 and expert.preprocessing.resize == "squash"
    for objective in ("dense", "crd"):
        run = tmp_path / objective
        taught = ["--objective", objective, "--teacher", str(teacher), "--epochs", "1"]
        distill.main([*SMALL_STAGE_2, *sets, *taught, "--out", str(run)])
        card = read_card(run / "expert")
        assert card["recipe"]["feature"] == card["backbone"]["feature"] == "layers:1,2"
        assert card["preprocessing"]["resize"] == "squash"
        assert weights(run) != weights(tmp_path / "first")
    out = tmp_path / "scores.csv"
    arguments = ["--manifest", sets[3], "--experts", str(teacher), "--out", str(out), "--workers", "0"]
    assert predict.main(arguments) == 0 and len(out.read_text().splitlines()) == 13


def test_top_tokens_are_chosen_from_training_images_and_stay_when_a_run_goes_on(sets, tmp_path, monkeypatch):
    run = tmp_path / "run"
    arguments = [*SMALL, *sets, "--feature", "top_tokens:2", "--ema", "0.9", "--out", str(run)]
    train.main(arguments)
    expert, card = load_expert(run / "expert"), read_card(run / "expert")
    positions = card["backbone"]["positions"]
    assert list(expert.spec.positions) == positions and len(set(positions)) == 2
    assert json.loads((run / "top_tokens.json").read_text())["positions"] == positions
    # Chosen by the untrained backbone, which the seed decides.
    torch.manual_seed(0)
    fresh = create_expert("tiny_clip", "random", feature="top_tokens:2", input_size=32).eval()
    rows = read_manifest(sets[1])
    images = torch.stack(
        [item["images"][fresh.preprocessing.key] for item in ScoreDataset(rows, [fresh.preprocessing.key])]
    )
    with torch.no_grad():
        tokens = fresh.read(images, [2]).layers[2].tokens
    assert tuple(positions) == top_positions(fisher_scores(tokens, rows["label"].to_numpy(int)), 2)
    monkeypatch.setattr("featdistill.training.top_tokens._scores", None)
    assert train.main(arguments) == 0
    student = tmp_path / "second"
    taught = ["--teacher", str(run / "expert"), "--epochs", "1", "--out", str(student)]
    distill.main([*SMALL_STAGE_2, *sets, *taught])
    assert read_card(student / "expert")["backbone"]["positions"] == positions


@needs_fork
def test_two_processes_train_a_feature_that_leaves_the_last_block_out(sets, tmp_path):
    plain = [*SMALL, *sets, "--backbone", "timm:test_vit", "--head-dropout", "0", "--epochs", "1"]
    plain += ["--precision", "fp32"]
    for feature in ("layers:2,4", "top_tokens:2"):
        runs = tmp_path / f"{feature[:3]}-one", tmp_path / f"{feature[:3]}-two"
        for run, world in zip(runs, (1, 2), strict=True):
            arguments = [*plain, "--feature", feature, "--out", str(run)]
            assert statuses(fork(partial(train.main, arguments), world)) == [0] * world
        np.testing.assert_allclose(losses(runs[1]), losses(runs[0]), rtol=1e-4)
        positions = [read_card(run / "expert")["backbone"].get("positions") for run in runs]
        assert positions[0] == positions[1]


def test_what_a_feature_excludes_is_one_clear_error(sets, tmp_path):
    arguments = [*SMALL, *sets, "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="feature 'registers': the backbone has no registers"):
        train.main([*arguments, "--feature", "registers"])
    with pytest.raises(UserError, match=r"feature top_tokens:2 needs tokens .* use --mask-level pixel"):
        train.main([*arguments, "--feature", "top_tokens:2", "--mask", "random", "--mask-level", "token"])
    assert not (tmp_path / "run").exists()
