"""Sharpness-aware minimization against its formula, and in runs."""

import copy

import numpy as np
import pytest
import torch
from processes import fork, needs_fork, statuses
from torch import nn
from training_runs import SMALL, SMALL_STAGE_2, kill_at, lines, losses, weights

import distill
import train
from featdistill.training.optimizer import uphill
from featdistill.training.trainer import Trainer


def test_weights_go_along_the_gradient_by_rho_and_come_back_to_the_same_bits():
    torch.manual_seed(0)
    first, second, frozen = (nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2,)))
    first.grad, second.grad = torch.randn(3, 4), torch.randn(5)
    before = [value.detach().clone() for value in (first, second, frozen)]
    norm = np.sqrt(sum(np.sum(value.grad.numpy() ** 2) for value in (first, second)))
    with uphill([first, second, frozen], 0.3):
        for value, old in ((first, before[0]), (second, before[1])):
            wanted = old.numpy() + 0.3 * value.grad.numpy() / norm
            np.testing.assert_allclose(value.detach().numpy(), wanted, rtol=1e-6)
        assert torch.equal(frozen, before[2])
    assert all(torch.equal(*pair) for pair in zip((first, second, frozen), before, strict=True))


@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_the_weights(gradient):
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([gradient, 1.0])
    with uphill([weight], 0.1):
        assert not torch.isfinite(weight).all()
    assert torch.equal(weight, torch.ones(2))


def test_the_gradient_of_a_step_is_that_at_the_weights_uphill(sets, tmp_path, monkeypatch):
    """With two passes per step, dropout and BatchNorm, whose statistics are those of the first passes."""
    seen = {}
    go = Trainer._take_gradient_uphill

    def recorded(trainer, batches):
        task = copy.deepcopy(trainer.task)
        first = {name: p.grad.clone() for name, p in trainer.task.named_parameters()}
        statistics = [value.clone() for value in trainer.statistics]
        go(trainer, batches)
        pairs = zip(trainer.statistics, statistics, strict=True)
        seen["statistics"] = all(torch.equal(*pair) for pair in pairs) and len(statistics) > 0
        norm = np.sqrt(sum(np.sum(value.double().numpy() ** 2) for value in first.values()))
        with torch.no_grad():
            for name, parameter in task.named_parameters():
                parameter += 0.5 * first[name] / norm
        for part, batch in enumerate(batches):
            number = trainer.step * 2 + part
            seed = np.random.SeedSequence((trainer.recipe.seed, 1, number)).generate_state(1)[0]
            torch.manual_seed(int(seed))
            (task.train()(batch)["loss"] / 2).backward()
        seen["pairs"] = [
            (first[name], p.grad.clone(), q.grad.clone())
            for (name, p), q in zip(trainer.task.named_parameters(), task.parameters(), strict=True)
        ]

    monkeypatch.setattr(Trainer, "_take_gradient_uphill", recorded)
    own = ["--sam-rho", "0.5", "--accumulation", "2", "--batch-size", "40", "--epochs", "1"]
    train.main([*SMALL, *sets, *own, "--precision", "fp32", "--out", str(tmp_path / "run")])
    assert seen["statistics"]
    for _, found, wanted in seen["pairs"]:
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(first, found, rtol=0.1) for first, found, _ in seen["pairs"])


SAM = ["--sam-rho", "0.05", "--checkpoint-every-s", "0", "--accumulation", "2"]


def test_a_killed_run_with_sam_ends_like_an_undisturbed_one(sets, tmp_path):
    arguments = [*SMALL, *sets, *SAM, "--ema", "0.9"]
    train.main([*arguments, "--out", str(tmp_path / "whole")])
    train.main([*arguments, "--sam-rho", "0", "--out", str(tmp_path / "plain")])
    kill_at(6, arguments, tmp_path / "run")
    train.main([*arguments, "--out", str(tmp_path / "run")])
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert weights(tmp_path / "whole") != weights(tmp_path / "plain")


@needs_fork
def test_two_processes_go_uphill_like_one(sets, tmp_path):
    arguments = [*SMALL, *sets, *SAM, "--backbone", "timm:test_vit", "--head-dropout", "0", "--epochs", "1"]
    train.main([*arguments, "--out", str(tmp_path / "one")])
    assert statuses(fork(lambda: train.main([*arguments, "--out", str(tmp_path / "two")]), world=2)) == [0, 0]
    one, two = ([loss for _, loss in losses(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)


def test_the_queue_of_reading_b_gets_each_key_once(sets, tmp_path, monkeypatch):
    train.main([*SMALL, *sets, "--epochs", "1", "--out", str(tmp_path / "one")])
    filled = []
    step = Trainer._step

    def counted(trainer, stream):
        step(trainer, stream)
        filled.append(trainer.task.crd.queue.filled.item())

    monkeypatch.setattr(Trainer, "_step", counted)
    own = ["--teacher", str(tmp_path / "one" / "expert"), "--objective", "crd", "--crd-queue", "100"]
    distill.main([*SMALL_STAGE_2, *sets, *SAM, *own, "--epochs", "1", "--out", str(tmp_path / "two")])
    assert filled == [8, 16, 24, 32, 40]


def test_a_step_whose_gradient_is_not_finite_is_skipped(sets, tmp_path, monkeypatch):
    add, calls = Trainer._add_gradient, iter(range(1000))

    def spoiled(trainer, batch, part):
        trainer.failure = None
        output = add(trainer, batch, part)
        if next(calls) == 4:  # a first pass of the second step
            next(trainer.task.parameters()).grad.fill_(float("nan"))
        return output

    monkeypatch.setattr(Trainer, "_add_gradient", spoiled)
    run = tmp_path / "run"
    train.main([*SMALL, *sets, *SAM, "--epochs", "1", "--log-every", "5", "--out", str(run)])
    (line,) = (line for line in lines(run) if "skipped" in line)
    assert line["skipped"] == 1 and np.isfinite(line["loss"])
