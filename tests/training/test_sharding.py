"""Checkpoints of tasks whose weights are distributed over two processes with gloo, on the CPU."""

import copy

import pytest
import torch
from accelerate import Accelerator
from processes import fork, needs_fork, statuses
from task_steps import make_batch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from featdistill.models.expert import create_expert
from featdistill.recipe_groups import Objective, Optimization
from featdistill.training import sharding
from featdistill.training.optimizer import make_optimizer, set_learning_rates
from featdistill.training.tasks import ClassifyTask


def task_of(seed: int, ema: float = 0.5) -> tuple[ClassifyTask, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    expert = create_expert("timm:test_vit", "random", input_size=32, head_dropout=0.0)
    task = ClassifyTask(expert, Objective(ema=ema))
    if distributed.is_initialized():
        task.to(memory_format=torch.contiguous_format)
        fully_shard(task, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    return task, make_optimizer(task, Optimization(), torch.device("cpu"))


def take_step(task: ClassifyTask, optimizer: torch.optim.Optimizer, step: int) -> None:
    set_learning_rates(optimizer, 100.0)
    task(make_batch(4, step))["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    task.after_step(step, 10)


def check_that_gathered_state_continues_a_run(folder, ema: float) -> None:
    task, optimizer = task_of(0, ema)
    take_step(task, optimizer, 0)
    state = copy.deepcopy(sharding.gather(task, optimizer))
    if distributed.is_initialized():
        # The main process writes the checkpoint, and all read it.
        assert bool(state[0]) == (distributed.get_rank() == 0)
        if state[0]:
            torch.save(state, folder / "state.pt")
        distributed.barrier()
        state = torch.load(folder / "state.pt", weights_only=True)
    take_step(task, optimizer, 1)
    other, other_optimizer = task_of(1, ema)
    sharding.spread(other, other_optimizer, *state)
    take_step(other, other_optimizer, 1)
    expected, found = sharding.gather_weights(task), sharding.gather_weights(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_what_was_gathered_continues_a_run(tmp_path):
    check_that_gathered_state_continues_a_run(tmp_path, ema=0.5)


@needs_fork
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_two_processes_have_gathered_continues_a_sharded_run(tmp_path):
    def main() -> None:
        distributed.init_process_group("gloo")
        check_that_gathered_state_continues_a_run(tmp_path, ema=0.0)
        distributed.destroy_process_group()

    assert statuses(fork(main, world=2)) == [0, 0]


def test_the_whole_expert_is_the_one_that_is_scored():
    task, optimizer = task_of(0)
    take_step(task, optimizer, 0)
    expert = sharding.whole_expert(task, sharding.gather_weights(task))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(expert(images), task.average.expert.eval()(images))
    assert not torch.equal(expert(images), task.expert.eval()(images))
    assert not sharding.is_sharded(Accelerator(cpu=True))
