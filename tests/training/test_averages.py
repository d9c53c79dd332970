"""Averages of the weights against NumPy, with BatchNorm's statistics, checkpoints and several processes."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from processes import fork, needs_fork, statuses
from torch import nn
from training_runs import SMALL, kill_at, losses, weights

import train
from featdistill.models.expert import Expert, create_expert, load_expert
from featdistill.recipe_groups import Finetuning, Objective
from featdistill.training import finetuning
from featdistill.training.averages import EqualAverage, WeightAverage, average_decay_at, renew_statistics
from featdistill.training.tasks import ClassifyTask


def make_expert(backbone: str = "tiny_clip") -> Expert:
    torch.manual_seed(0)
    return create_expert(backbone, "random", input_size=32, head_hidden=8, head_dropout=0.5)


@pytest.fixture
def expert():
    return make_expert()


@torch.no_grad()
def moved(expert: Expert, seed: int = 1) -> Expert:
    """Add noise to all weights and buffers."""
    generator = torch.Generator().manual_seed(seed)
    for value in expert.state_dict().values():
        if value.is_floating_point():
            value += torch.rand(value.shape, generator=generator)
    return expert


def images(seed: int, count: int = 8, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).to(torch.uint8)


def test_the_average_forgets_its_first_weights_soon():
    assert [average_decay_at(step, 0.9995) for step in (0, 90)] == [0.1, 0.91]
    assert average_decay_at(10**6, 0.9995) == 0.9995 and average_decay_at(0, 0.05) == 0.05


def test_the_average_is_a_moving_average_apart_from_the_student(expert):
    average = WeightAverage(expert, 0.999)
    first = expert.head[0].weight.detach().clone()
    moved(expert)
    average.after_step(expert, 0)
    second = expert.head[0].weight.detach().clone()
    torch.testing.assert_close(average.expert.head[0].weight.detach(), 0.1 * first + 0.9 * second)
    assert torch.equal(second, expert.head[0].weight) and expert.head[0].weight.requires_grad
    # BatchNorm's statistics are taken as they are.
    buffers = dict(expert.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in average.expert.named_buffers())
    average.train()
    assert not any(module.training for module in average.modules())


def test_the_equal_average_is_the_mean_of_the_epochs_that_count(expert):
    task = ClassifyTask(expert, Objective(swa_start=2))
    states = []
    for epoch in range(1, 6):
        moved(expert, epoch)
        task.after_step(epoch, 5)
        task.after_epoch(epoch)
        states.append({name: value.detach().numpy().copy() for name, value in expert.named_parameters()})
        assert (task.evaluated is expert) == (epoch < 2)
    for name, value in task.evaluated.named_parameters():
        wanted = np.mean([state[name].astype(np.float64) for state in states[1:]], axis=0)
        np.testing.assert_allclose(value.detach().numpy(), wanted, rtol=1e-6)
    task.train()
    assert not any(module.training for module in task.average.modules())
    assert not any(parameter.requires_grad for parameter in task.average.parameters())


def test_the_equal_average_of_adapters_is_that_of_the_weights_they_are_merged_into(expert):
    pytest.importorskip("peft")
    average = EqualAverage(expert, 1)
    finetuning.restrict(expert, Finetuning(finetune="lora", lora_rank=2))
    states = []
    for epoch in (1, 2):
        moved(expert, epoch)
        average.after_epoch(expert, epoch)
        states.append(finetuning.merged(expert).backbone.model.blocks[0].attn.qkv.weight.detach())
    found = average.expert.backbone.model.blocks[0].attn.qkv.weight
    torch.testing.assert_close(found, (states[0] + states[1]) / 2)
    assert not torch.equal(states[0], states[1])


def test_the_equal_average_reads_the_tokens_that_a_run_chooses_at_its_start():
    expert = create_expert("timm:test_vit", "random", feature="top_tokens:2", input_size=64)
    average = EqualAverage(expert, 1)
    expert.choose_tokens([0, 3])
    average.after_epoch(expert, 1)
    assert average.expert.feature.positions == average.expert.spec.positions == (0, 3)
    assert torch.equal(average.expert(images(0, side=64)), expert.eval()(images(0, side=64)))


def statistics(expert: Expert) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in expert.named_buffers() if "running" in name}


def numpy_statistics(expert: Expert, norms: list[nn.Module], batches: list[torch.Tensor]) -> dict:
    """Renew the statistics, and compute them a second time from what the layers received."""
    seen: dict[str, list] = {}
    names = {module: name for name, module in expert.named_modules()}
    hooks = [
        norm.register_forward_pre_hook(
            lambda module, inputs: seen.setdefault(names[module], []).append(inputs[0].double().numpy())
        )
        for norm in norms
    ]
    renew_statistics(expert, norms, batches, torch.clone)
    for hook in hooks:
        hook.remove()
    wanted = {}
    for name, inputs in seen.items():
        values = [np.moveaxis(value, 1, 0).reshape(value.shape[1], -1) for value in inputs]
        wanted[f"{name}.running_mean"] = np.mean([value.mean(1) for value in values], axis=0)
        wanted[f"{name}.running_var"] = np.mean([value.var(1, ddof=1) for value in values], axis=0)
    return wanted


@pytest.mark.parametrize("backbone", ["tiny_clip", "timm:test_efficientnet"])
def test_statistics_are_the_means_of_those_of_the_batches(backbone):
    expert = make_expert(backbone)
    task = ClassifyTask(expert, Objective(swa_start=1)).train()
    moved(expert)
    task.after_epoch(1)
    norms = task.stale_norms()
    batches = [images(seed, 8 + seed) for seed in range(3)]
    momenta, before = [norm.momentum for norm in norms], statistics(task.evaluated)
    wanted, found = numpy_statistics(task.evaluated, norms, batches), statistics(task.evaluated)
    assert wanted.keys() == found.keys() == before.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-3, atol=1e-4)
    assert not any(np.allclose(before[name], found[name], rtol=0.1) for name in found)
    assert [norm.momentum for norm in norms] == momenta
    assert not any(module.training for module in task.evaluated.modules())


def test_frozen_norms_keep_their_statistics_and_a_moving_average_has_the_students():
    for options in (Finetuning(finetune="frozen"), Finetuning(finetune="last_n", last_n=1)):
        expert = make_expert()
        task = ClassifyTask(expert, Objective(swa_start=1))
        finetuning.restrict(expert, options)
        finetuning.train_mode(task)
        task.after_epoch(1)
        assert task.stale_norms() == []
    assert ClassifyTask(make_expert(), Objective(ema=0.9)).train().stale_norms() == []


@needs_fork
def test_two_processes_have_the_statistics_of_all_their_batches(tmp_path):
    def stale() -> ClassifyTask:
        task = ClassifyTask(make_expert(), Objective(swa_start=1)).train()
        task.after_epoch(1)
        return task

    # As if one process had lost a batch whose images are broken.
    shares = ([0, 1, 2], [3, 4])

    def main() -> None:
        accelerator, task = Accelerator(cpu=True), stale()
        share = [images(seed) for seed in shares[accelerator.process_index]]
        renew_statistics(task.evaluated, task.stale_norms(), share, accelerator.reduce)
        torch.save(task.evaluated.state_dict(), tmp_path / f"{accelerator.process_index}.pt")
        accelerator.end_training()

    assert statuses(fork(main, world=2)) == [0, 0]
    task = stale()
    renew_statistics(task.evaluated, task.stale_norms(), map(images, range(5)), torch.clone)
    wanted = task.evaluated.state_dict()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name in statistics(task.evaluated):
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


SWA = ["--epochs", "3", "--swa-start", "2", "--checkpoint-every-s", "0", "--head-dropout", "0.5"]


def test_a_run_saves_the_average_with_renewed_statistics_and_a_killed_one_too(sets, tmp_path, monkeypatch):
    states = []
    after_epoch = ClassifyTask.after_epoch

    def keep(task, epoch):
        after_epoch(task, epoch)
        states.append({name: value.clone() for name, value in task.expert.state_dict().items()})

    arguments, whole, run = [*SMALL, *sets, *SWA], tmp_path / "whole", tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ClassifyTask, "after_epoch", keep)
        train.main([*arguments, "--out", str(whole)])
    saved = load_expert(whole / "expert-last").state_dict()
    for name, value in saved.items():
        if "running" in name:
            assert not any(torch.allclose(value, state[name], rtol=1e-3) for state in states), name
        elif "num_batches" not in name:
            torch.testing.assert_close(value, (states[1][name] + states[2][name]) / 2)
    # Every epoch has 5 steps; the run dies in the third epoch, when the average holds one epoch.
    kill_at(12, arguments, run)
    train.main([*arguments, "--out", str(run)])
    assert weights(run) == weights(whole) and losses(run) == losses(whole)
    assert load_expert(run / "expert-last").preprocessing == load_expert(whole / "expert-last").preprocessing


@needs_fork
def test_two_processes_average_like_one(sets, tmp_path):
    arguments = [*SMALL, *sets, *SWA, "--backbone", "timm:test_vit", "--head-dropout", "0"]
    train.main([*arguments, "--out", str(tmp_path / "one")])
    assert statuses(fork(lambda: train.main([*arguments, "--out", str(tmp_path / "two")]), world=2)) == [0, 0]
    one, two = (load_expert(tmp_path / name / "expert-last").state_dict() for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
