"""Objectives with networks of their own, against NumPy."""

import copy

import numpy as np
import pytest
import torch
from scipy.special import erf
from task_steps import make_batch, take_steps
from training_runs import SMALL, losses, weights

import distill
import train
from featdistill.models.expert import create_expert, load_expert
from featdistill.recipe_groups import Distillation, Objective
from featdistill.training.optimizer import parameter_groups
from featdistill.training.recipe import Recipe
from featdistill.training.tasks import ClassifyTask, DistillTask
from featdistill.training.trainer import Trainer


@pytest.fixture
def expert():
    torch.manual_seed(0)
    return create_expert("timm:test_vit", "random", input_size=32, head_hidden=8, head_dropout=0.0)


@pytest.fixture
def batch():
    return make_batch(6, 2)


def numpy_network(network: torch.nn.Sequential, values: np.ndarray) -> np.ndarray:
    """Linear, GELU, linear."""
    weight_1, bias_1, weight_2, bias_2 = (p.detach().double().numpy() for p in network.parameters())
    hidden = values @ weight_1.T + bias_1
    return (hidden * (1 + erf(hidden / np.sqrt(2))) / 2) @ weight_2.T + bias_2


def test_feature_consistency_is_the_distance_of_the_networks_output_from_the_clean_feature(expert, batch):
    task = ClassifyTask(expert, Objective(consistency_weight=0.5, feature_consistency_weight=0.25))
    assert task.views == ("clean",)
    output = task(batch)
    clean, distorted = (
        expert.encode(batch[view]).feature.detach().double().numpy() for view in ("images_clean", "images")
    )
    network = task.extras["feature_consistency"].network
    wanted = np.mean((numpy_network(network, distorted) - clean) ** 2)
    assert output["feature_consistency"].item() == pytest.approx(wanted, rel=1e-4) and wanted > 0
    loss = output["bce"] + 0.5 * output["consistency"] + 0.25 * output["feature_consistency"]
    assert output["loss"].item() == pytest.approx(loss.item(), rel=1e-6)


def test_the_clean_feature_has_no_gradient_and_needs_no_divergence(expert, batch):
    task = ClassifyTask(expert, Objective(bce_weight=0.0, feature_consistency_weight=1.0))
    output = task(batch)
    assert output.keys() == {"loss", "logit", "bce", "feature_consistency"}
    output["loss"].backward()
    found = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    clean = expert.encode(batch["images_clean"]).feature.detach()
    network = task.extras["feature_consistency"].network
    (network(expert.encode(batch["images"]).feature) - clean).square().mean().backward()
    assert any(found["expert.backbone.model.blocks.0.attn.qkv.weight"].flatten())
    for name, parameter in task.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad)


EXTRAS = {
    "feature consistency": {"feature_consistency_weight": 0.25, "feature_consistency_hidden": 8},
}


@pytest.mark.parametrize("options", EXTRAS.values(), ids=EXTRAS)
def test_extras_are_trained_and_checkpointed_but_not_saved_with_the_expert(options, expert, batch):
    other, names = copy.deepcopy(expert), set(expert.state_dict())
    task = ClassifyTask(expert, Objective(**options))
    extra = task.extra_parameters()
    assert extra and {id(p) for p in extra} == {id(p) for p in task.extras.parameters()}
    trained = {id(p) for group in parameter_groups(task, Recipe()) for p in group["params"]}
    assert trained == {id(p) for p in task.parameters()}
    before = copy.deepcopy(task.extras.state_dict())
    batches = [make_batch(6, seed) for seed in range(4)]
    take_steps(task, batches[:2], total=4)
    assert all(not torch.equal(value, before[name]) for name, value in task.extras.state_dict().items())
    state = copy.deepcopy(task.checkpoint())
    take_steps(task, batches[2:], first=2, total=4)
    torch.manual_seed(7)
    continued = ClassifyTask(other, Objective(**options))
    continued.load_checkpoint(state)
    take_steps(continued, batches[2:], first=2, total=4)
    assert all(torch.equal(value, task.state_dict()[key]) for key, value in continued.state_dict().items())
    assert set(task.evaluated.state_dict()) == names


@pytest.mark.parametrize("options", EXTRAS.values(), ids=EXTRAS)
def test_stage_2_has_them_too(options, expert, batch):
    task = DistillTask(expert, Distillation(objective="dense+crd", **options))
    projection = list(task.crd.student_projection.parameters())
    assert len(task.extra_parameters()) == len(list(task.extras.parameters())) + len(projection)
    assert ClassifyTask(expert, Objective(**options))(batch).keys() < task(batch).keys()


@pytest.mark.parametrize("options", EXTRAS.values(), ids=EXTRAS)
def test_a_killed_run_with_extras_ends_like_an_undisturbed_one(options, sets, tmp_path, monkeypatch):
    flags = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    arguments = [*SMALL, *sets, *flags, "--checkpoint-every-s", "0"]
    whole, run, step = tmp_path / "whole", tmp_path / "run", Trainer._step
    train.main([*arguments, "--out", str(whole)])

    def die(trainer, stream):
        if trainer.step == 7:
            raise KeyboardInterrupt
        step(trainer, stream)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", die)
        with pytest.raises(KeyboardInterrupt):
            train.main([*arguments, "--out", str(run)])
    train.main([*arguments, "--out", str(run)])
    assert weights(run) == weights(whole) and losses(run) == losses(whole)
    assert not any("extras" in name for name in load_expert(run / "expert").state_dict())
    taught = ["--teacher", str(run / "expert"), "--epochs", "1", "--out", str(tmp_path / "two")]
    assert distill.main([*arguments, *taught]) == 0
