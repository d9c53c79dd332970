"""How a batch is divided among forward passes and processes must not matter."""

import copy
import os

import pytest
import torch
from processes import fork, needs_fork, statuses
from task_steps import MOMENTUM_B, make_batch, take_steps
from torch import distributed
from training_runs import SMALL, last_line, losses

import train
from featdistill.models.expert import create_expert
from featdistill.recipe_groups import Distillation, Objective
from featdistill.training.contrastive import gather_batch, gather_parts
from featdistill.training.tasks import ClassifyTask, DistillTask

STEPS = 3
KINDS = ("bce", "dense", "crd")
# A transformer without BatchNorm and dropout: an image's result does not depend on the others of its batch.
BATCH_FREE = ["--backbone", "timm:test_vit", "--head-dropout", "0", "--epochs", "1"]


def outcome(kind: str, **division) -> dict[str, dict[str, torch.Tensor]]:
    """Return the first gradient and the final state of a task; CRD's queue starts with other images' keys."""
    torch.manual_seed(0)
    expert = create_expert("timm:test_vit", "random", input_size=32, head_hidden=8, head_dropout=0.0)
    if kind == "bce":
        task = ClassifyTask(expert, Objective(ai_weight=2.0))
    elif kind == "supcon":
        task = ClassifyTask(expert, Objective(supcon_weight=0.5, auxiliary_features="layers:1,2"))
    else:
        task = DistillTask(expert, Distillation(**MOMENTUM_B | {"crd_queue": 72} if kind == "crd" else {}))
    if kind == "crd":
        keys = torch.nn.functional.normalize(torch.randn(20, 16), dim=1)
        task.crd.queue.enqueue(keys, torch.arange(20) + 9000, torch.arange(20) % 2.0)
    gradient = take_steps(task, [make_batch(32, seed) for seed in range(STEPS)], **division)
    return {"gradient": gradient, "state": copy.deepcopy(task.state_dict())}


@pytest.fixture(scope="module")
def joint():
    """One process with the whole batch, in one pass."""
    return {kind: outcome(kind) for kind in KINDS}


def assert_same(found: dict, expected: dict) -> None:
    assert all(value.any() for key, value in expected["gradient"].items() if key.endswith("qkv.weight"))
    torch.testing.assert_close(found["gradient"], expected["gradient"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["state"], expected["state"], rtol=1e-4, atol=1e-5)
    for name in ("ids", "labels", "pointer"):
        key = f"crd.queue.{name}"
        assert key not in expected["state"] or torch.equal(found["state"][key], expected["state"][key])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_equals_the_larger_batch(joint, kind):
    assert_same(outcome(kind, parts=4), joint[kind])


def test_the_queue_has_wrapped_round_in_these_tests(joint):
    state = joint["crd"]["state"]
    assert state["crd.queue.pointer"].item() == (20 + 32 * STEPS) % 72
    assert not (state["crd.queue.ids"] >= 9000).any()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Two processes with gloo and DDP, each with two passes per step, on the same batches."""
    folder = tmp_path_factory.mktemp("two")

    def task() -> None:
        rank = int(os.environ["RANK"])
        distributed.init_process_group("gloo")
        found = {kind: outcome(kind, parts=2, rank=rank, world=2) for kind in KINDS}
        # As if some images were broken.
        counts = ((3, 1), (2, 3))[rank]
        ids = [torch.arange(count) + 100 * rank + 10 * part for part, count in enumerate(counts)]
        parts = [(part, torch.stack([part, 2 * part], dim=1).float()) for part in ids]
        torch.save(found | {"gathered": gather_parts(parts)}, folder / f"{rank}.pt")
        distributed.destroy_process_group()

    assert statuses(fork(task, world=2)) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@needs_fork
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(two_processes, joint, kind):
    for found in two_processes:
        assert_same(found[kind], joint[kind])


@needs_fork
def test_both_processes_hold_the_same_queue(two_processes):
    states = [found["crd"]["state"] for found in two_processes]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0] if "queue" in key)


@needs_fork
def test_keys_are_gathered_by_pass_then_by_process_where_some_are_missing(two_processes):
    for found in two_processes:
        ids, values = found["gathered"]
        assert ids.tolist() == [0, 1, 2, 100, 101, 10, 110, 111, 112]
        assert values[:, 1].tolist() == [2 * value for value in ids.tolist()]


@needs_fork
def test_the_supervised_contrastive_loss_is_that_of_the_batch_of_all_processes(tmp_path):
    """Each process has its share of a batch, and features of one class are compared across both."""

    def main() -> None:
        rank = int(os.environ["RANK"])
        distributed.init_process_group("gloo")
        # As if some images were broken: the shares of two and three images are one batch of five.
        weight = torch.tensor([1.0], requires_grad=True)
        feature, label = features_of(5)
        own = slice(0, 2) if rank == 0 else slice(2, 5)
        joint, labels = gather_batch(feature[own] * weight, label[own])
        loss = (joint**2 * labels[:, None]).sum()
        loss.backward()
        distributed.all_reduce(weight.grad)
        found = {"joint": joint.detach(), "labels": labels, "loss": loss.detach()}
        found |= {"gradient": weight.grad / 2, "run": outcome("supcon", rank=rank, world=2)}
        torch.save(found, tmp_path / f"{rank}.pt")
        distributed.destroy_process_group()

    assert statuses(fork(main, world=2)) == [0, 0]
    expected, (feature, label) = outcome("supcon"), features_of(5)
    total = (feature**2 * label[:, None]).sum()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_same(found["run"], expected)
        assert torch.equal(found["joint"], feature) and torch.equal(found["labels"], label)
        torch.testing.assert_close(found["loss"], total)
        torch.testing.assert_close(found["gradient"], 2 * total[None])


def features_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 4, generator=generator), torch.arange(count) % 2.0


def losses_of(run) -> list[float]:
    return [loss for _, loss in losses(run)]


@needs_fork
def test_runs_with_accumulation_or_two_processes_take_the_same_steps(sets, tmp_path):
    common = [*SMALL, *sets, *BATCH_FREE]
    train.main([*common, "--out", str(tmp_path / "one")])
    train.main([*common, "--out", str(tmp_path / "parts"), "--accumulation", "4"])
    both = fork(lambda: train.main([*common, "--out", str(tmp_path / "two")]), world=2)
    assert statuses(both) == [0, 0]
    for name in ("parts", "two"):
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    one, two = last_line(tmp_path / "one"), last_line(tmp_path / "two")
    assert one["holdout_images"] == two["holdout_images"] == 12
    assert two["holdout_clean_auc"] == pytest.approx(one["holdout_clean_auc"], abs=0.06)
