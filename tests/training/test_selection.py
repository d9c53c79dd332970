"""Which epoch is kept as the best one, and when a run ends because none is better."""

import json

import pytest
import torch
from training_runs import SMALL, kill_at, lines, losses, weights

import train
from featdistill.models.expert import read_card
from featdistill.recipe_groups import Selection
from featdistill.training import trainer
from featdistill.training.selection import BestEpoch, quality

# Clean and robust AUC of six epochs: the robust one peaks in epoch 2, the mix of .7 and .3 in epoch 3.
AUCS = [(0.50, 0.60), (0.60, 0.80), (0.95, 0.78), (0.90, 0.79), (0.80, 0.80), (0.99, 0.70)]


def holdout(clean: float | None, robust: float | None) -> dict:
    return {"images": 12, "clean_auc": clean, "robust_auc": robust}


@pytest.mark.parametrize(
    "share, clean, robust, wanted",
    [
        (1.0, 0.9, 0.6, 0.6),
        (0.7, 0.9, 0.6, 0.7 * 0.6 + 0.3 * 0.9),
        (0.0, 0.9, 0.6, 0.9),
        (0.7, None, 0.6, 0.6),
        (0.7, 0.9, None, 0.9),
        (0.7, None, None, None),
    ],
)
def test_quality_is_the_stated_mix_and_falls_back_to_the_part_that_is_defined(share, clean, robust, wanted):
    found = quality(holdout(clean, robust), Selection(best_robust_share=share))
    assert found == (wanted if wanted is None else pytest.approx(wanted, abs=1e-12))


@pytest.mark.parametrize(
    "options, best, ends",
    [
        ({}, 2, None),
        ({"best_robust_share": 0.7}, 3, None),
        ({"patience": 2}, 2, 4),
        ({"patience": 2, "best_robust_share": 0.7}, 3, 5),
        ({"patience": 4}, 2, 6),
    ],
)
def test_the_best_epoch_and_the_end_follow_the_mix(options, best, ends):
    """The second of two equal epochs is not better than the first."""
    found = BestEpoch(Selection(**options))
    over = []
    for epoch, aucs in enumerate(AUCS, 1):
        found.add(epoch, holdout(*aucs))
        over += [epoch] if found.waited_enough(epoch) else []
    assert found.epoch == best and (over[0] if over else None) == ends


def test_the_first_epoch_is_kept_even_if_no_auc_is_defined():
    found = BestEpoch(Selection())
    assert found.add(1, holdout(None, None)) and not found.add(2, holdout(None, None))
    assert found.add(3, holdout(0.1, None)) and (found.epoch, found.quality) == (3, 0.1)


@pytest.fixture
def scripted(monkeypatch):
    """Let the hold-out give the AUCs above, whatever the expert scores."""

    def score(expert, rows, recipe, accelerator):
        score.epoch += 1
        return holdout(*AUCS[score.epoch - 1]), []

    monkeypatch.setattr(trainer, "score_holdout", score)
    return score


def test_a_run_ends_early_and_a_killed_one_ends_alike(sets, tmp_path, scripted, capsys):
    common = [*SMALL, *sets, "--epochs", "6", "--checkpoint-every-s", "0"]
    arguments = [*common, "--best-robust-share", "0.7", "--patience", "2"]
    scripted.epoch = 0
    assert train.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    assert "no epoch after 3 was better" in capsys.readouterr().out
    whole = tmp_path / "whole"
    cards = [read_card(whole / name) for name in ("expert", "expert-last")]
    # run_all.sh goes on after a run that is finished, however many epochs that took.
    assert [(card["epoch"], card["finished"]) for card in cards] == [(3, False), (5, True)]
    assert lines(whole)[-1]["epoch"] == 5
    assert torch.load(whole / "resume" / "state.pt", weights_only=True)["task"] is None

    # Killed in the second epoch of the wait, after which only the checkpoint says how long it has lasted.
    scripted.epoch = 0
    kill_at(22, arguments, tmp_path / "run")
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert weights(tmp_path / "run") == weights(whole) and losses(tmp_path / "run") == losses(whole)
    capsys.readouterr()
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert "nothing to do" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert (recorded["best_robust_share"], recorded["patience"]) == (0.7, 2)
