"""Objectives with networks of their own, against NumPy."""

import copy

import numpy as np
import pytest
import torch
from scipy.special import erf
from task_steps import make_batch, take_steps
from training_runs import SMALL, SMALL_STAGE_2, kill_at, losses, weights

import distill
import train
from featdistill.command_line import UserError
from featdistill.models.expert import create_expert, load_expert
from featdistill.models.features import read_atoms
from featdistill.recipe_groups import Distillation, Objective
from featdistill.training.contrastive import supervised_contrastive
from featdistill.training.extras import LayerHeads
from featdistill.training.optimizer import parameter_groups
from featdistill.training.recipe import Recipe
from featdistill.training.tasks import ClassifyTask, DistillTask


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


HEADS = ["layers:1,3", "mean+std:2", "pool", "registers+mean:2,4"]


@pytest.mark.parametrize("text", HEADS[:3])
def test_heads_of_layers_are_linear_on_normalized_tokens(text, expert, batch):
    options = Objective(auxiliary_features=text, auxiliary_weight=0.4, label_smoothing=0.1, focal_gamma=2.0)
    task = ClassifyTask(expert, options)
    heads = task.extras["auxiliary"]
    output = task(batch)
    values = read_atoms(expert.backbone, expert.normalized(batch["images"]), heads.atoms)
    label, losses = batch["label"].double().numpy(), []
    for atom, head in zip(heads.atoms, heads.heads, strict=True):
        x = values[atom].detach().double().numpy()
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        logit = x @ head.weight.detach().double().numpy()[0] + head.bias.item()
        p = 1 / (1 + np.exp(-logit))
        p_t, target = np.where(label == 1, p, 1 - p), label * 0.9 + 0.05
        losses.append(np.mean(-((1 - p_t) ** 2) * (target * np.log(p) + (1 - target) * np.log(1 - p))))
    assert output["auxiliary"].item() == pytest.approx(np.mean(losses), rel=1e-4)
    wanted = output["bce"] + 0.4 * output["auxiliary"]
    assert output["loss"].item() == pytest.approx(wanted.item(), rel=1e-6)
    # The expert's own output is the same as without the heads.
    plain = ClassifyTask(expert, Objective())(batch)
    torch.testing.assert_close(output["logit"], plain["logit"])


def test_the_heads_train_the_layers_they_read(expert, batch):
    task = ClassifyTask(expert, Objective(bce_weight=0.0, auxiliary_features="class:2"))
    task(batch)["loss"].backward()
    blocks = expert.backbone.model.blocks
    assert blocks[1].mlp.fc2.weight.grad.any() and not torch.any(blocks[2].mlp.fc2.weight.grad)


@pytest.mark.parametrize("text", HEADS)
def test_which_features_can_be_supervised_depends_on_the_backbone(text, expert):
    with_registers = create_expert("timm:test_vit3", "random", input_size=64)
    assert LayerHeads(with_registers, text).atoms
    if "registers" in text:
        with pytest.raises(UserError, match="the backbone has no registers"):
            LayerHeads(expert, text)


def test_features_that_cannot_be_supervised_are_one_clear_error(expert):
    with pytest.raises(UserError, match=r"'layers:7': 7 is not a layer"):
        LayerHeads(expert, "layers:7")
    with pytest.raises(UserError, match="top_tokens is not possible here"):
        LayerHeads(expert, "top_tokens:2")


def test_supervised_contrastive_loss_is_on_the_feature(expert, batch):
    task = ClassifyTask(expert, Objective(supcon_weight=0.3, supcon_temperature=0.2))
    output = task(batch)
    wanted = supervised_contrastive(expert.encode(batch["images"]).feature, batch["label"], 0.2)
    assert output["supcon"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert output["loss"].item() == pytest.approx((output["bce"] + 0.3 * wanted).item(), rel=1e-6)


EXTRAS = {
    "feature consistency": {"feature_consistency_weight": 0.25, "feature_consistency_hidden": 8},
    "heads of layers": {"auxiliary_features": "layers:1,2"},
    "all": {
        "feature_consistency_weight": 0.25,
        "auxiliary_features": "mean:1",
        "supcon_weight": 0.1,
        "consistency_weight": 0.5,
    },
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
def test_a_killed_run_with_extras_ends_like_an_undisturbed_one(options, sets, tmp_path):
    flags = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    arguments = [*SMALL, *sets, *flags, "--checkpoint-every-s", "0"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    train.main([*arguments, "--out", str(whole)])
    kill_at(7, arguments, run)
    train.main([*arguments, "--out", str(run)])
    assert weights(run) == weights(whole) and losses(run) == losses(whole)
    assert not any("extras" in name for name in load_expert(run / "expert").state_dict())
    taught = ["--teacher", str(run / "expert"), "--epochs", "1", "--out", str(tmp_path / "two")]
    assert distill.main([*SMALL_STAGE_2, *sets, *flags, *taught]) == 0
