import pytest
import torch
from torch import nn

from featdistill.models.expert import create_expert
from featdistill.recipe_groups import Objective, Optimization
from featdistill.training.optimizer import (
    learning_rate_factor,
    make_optimizer,
    parameter_groups,
    set_learning_rates,
)
from featdistill.training.tasks import ClassifyTask


def task_of(backbone: str) -> ClassifyTask:
    return ClassifyTask(create_expert(backbone, "random", input_size=32), Objective())


def groups_by_name(task: nn.Module, options: Optimization) -> dict[str, dict]:
    """The group of each of the task's trained parameters."""
    by_id = {id(p): group for group in parameter_groups(task, options) for p in group["params"]}
    return {name: by_id[id(p)] for name, p in task.named_parameters() if p.requires_grad}


def test_the_learning_rate_warms_up_and_falls_on_a_cosine():
    factors = [learning_rate_factor(step, 100, Optimization(warmup=0.1)) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1 and factors[10] == 1
    assert factors[55] == pytest.approx(0.505) and 0.01 < factors[99] < 0.0113
    assert factors[:10] == sorted(factors[:10]) and factors[9:] == sorted(factors[9:], reverse=True)
    assert learning_rate_factor(0, 1, Optimization(warmup=0.0)) == 1


def test_the_step_schedule_is_pytorchs_steplr_epoch_by_epoch():
    recipe = Optimization(schedule="step", step_epochs=2, step_factor=0.7, warmup=0.0, epochs=5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    for epoch in range(5):
        for step in range(3 * epoch, 3 * epoch + 3):
            assert learning_rate_factor(step, 15, recipe) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    warming = Optimization(schedule="step", step_epochs=1, step_factor=0.5, warmup=0.2, epochs=5)
    assert [learning_rate_factor(step, 15, warming) for step in range(4)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.5]
    )


def test_adam_adds_the_decay_to_the_gradient_and_adamw_does_not():
    task = task_of("tiny_clip")
    adam, adamw = (
        make_optimizer(task, Optimization(optimizer=name), torch.device("cpu")) for name in ("adam", "adamw")
    )
    assert type(adam) is torch.optim.Adam and type(adamw) is torch.optim.AdamW
    assert [group["weight_decay"] for group in adam.param_groups] == [
        group["weight_decay"] for group in adamw.param_groups
    ]


def test_norms_and_biases_do_not_decay_and_the_head_learns_faster():
    task = task_of("tiny_siglip")
    recipe = Optimization(learning_rate=2.0, head_learning_rate_factor=5, weight_decay=0.3)
    named = groups_by_name(task, recipe)
    assert len(named) == len(list(task.parameters()))
    head = named["expert.head.0.weight"]
    assert head["peak_learning_rate"] == 10 and head["weight_decay"] == 0.3
    model = "expert.backbone.model."
    assert named[model + "blocks.0.attn.qkv.weight"]["weight_decay"] == 0.3
    for name in ("pos_embed", "norm.weight", "blocks.0.attn.qkv.bias", "attn_pool.latent"):
        assert named[model + name]["weight_decay"] == 0 and named[model + name]["peak_learning_rate"] == 2


def test_the_tasks_own_parameters_learn_like_the_head():
    class Projecting(ClassifyTask):
        def __init__(self, expert):
            super().__init__(expert, Objective())
            self.projection = nn.Linear(4, 4)

        def extra_parameters(self):
            return list(self.projection.parameters())

    task = Projecting(create_expert("tiny_clip", "random", input_size=32))
    named = groups_by_name(
        task, Optimization(learning_rate=1.0, head_learning_rate_factor=7, weight_decay=0.2)
    )
    assert named["projection.weight"]["peak_learning_rate"] == named["projection.bias"]["peak_learning_rate"]
    assert named["projection.weight"]["peak_learning_rate"] == 7
    assert (named["projection.weight"]["weight_decay"], named["projection.bias"]["weight_decay"]) == (0.2, 0)


def test_each_layer_learns_slower_than_the_one_behind_it():
    task = task_of("tiny_clip")
    named = groups_by_name(
        task, Optimization(learning_rate=1.0, head_learning_rate_factor=10, layer_decay=0.5, weight_decay=0.1)
    )
    model = "expert.backbone.model."
    # Two blocks: the norm and the projection behind them, block 1, block 0, the stem.
    expected = {"norm.weight": 1, "head.weight": 1, "blocks.1.mlp.fc1.weight": 0.5}
    expected |= {"blocks.0.attn.qkv.weight": 0.25, "blocks.0.norm1.bias": 0.25, "pos_embed": 0.125}
    found = {name: named[model + name]["peak_learning_rate"] for name in expected}
    assert found == expected
    assert named["expert.head.0.weight"]["peak_learning_rate"] == 10
    assert named[model + "blocks.0.norm1.bias"]["weight_decay"] == 0
    layers = task.expert.backbone.layers()
    assert sorted(name for names in layers for name in names) == sorted(
        name for name, _ in task.expert.backbone.named_parameters()
    )


def test_frozen_parameters_are_in_no_group():
    task = task_of("tiny_clip")
    task.expert.backbone.requires_grad_(False)
    count = sum(len(group["params"]) for group in parameter_groups(task, Optimization()))
    assert count == len(list(task.expert.head.parameters()))


def test_a_learning_rate_is_its_groups_peak_times_the_factor():
    task = task_of("tiny_clip")
    optimizer = make_optimizer(task, Optimization(learning_rate=2.0), torch.device("cpu"))
    set_learning_rates(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {1.0, 10.0}
