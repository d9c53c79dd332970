"""One process: gathering is then the identity. That FSDP spreads weights is not tested here."""

import copy

import torch
from accelerate import Accelerator

from featdistill.models.expert import create_expert
from featdistill.recipe_groups import Objective, Optimization
from featdistill.training import sharding
from featdistill.training.optimizer import make_optimizer, set_learning_rates
from featdistill.training.tasks import ClassifyTask


def task_of(seed: int) -> tuple[ClassifyTask, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    task = ClassifyTask(create_expert("timm:test_vit", "random", head_dropout=0.0), Objective(ema=0.5))
    return task, make_optimizer(task, Optimization(), torch.device("cpu"))


def take_step(task: ClassifyTask, optimizer: torch.optim.Optimizer, step: int) -> None:
    rng = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (4, 3, 160, 160), dtype=torch.uint8, generator=rng)
    set_learning_rates(optimizer, 100.0)
    task({"images": images, "label": torch.tensor([0.0, 1, 0, 1])})["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    task.after_step(step, 10)


def test_what_was_gathered_continues_a_run():
    task, optimizer = task_of(0)
    take_step(task, optimizer, 0)
    weights, state = copy.deepcopy(sharding.gather(task, optimizer))
    take_step(task, optimizer, 1)
    other, other_optimizer = task_of(1)
    sharding.spread(other, other_optimizer, weights, state)
    take_step(other, other_optimizer, 1)
    for name, value in task.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_whole_expert_is_the_one_that_is_scored():
    task, optimizer = task_of(0)
    take_step(task, optimizer, 0)
    expert = sharding.whole_expert(task, sharding.gather_weights(task))
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    assert torch.equal(expert(images), task.average.expert.eval()(images))
    assert not torch.equal(expert(images), task.expert.eval()(images))
    assert not sharding.is_sharded(Accelerator(cpu=True))
