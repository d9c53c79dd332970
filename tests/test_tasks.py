import copy

import pytest
import torch

from featdistill.experts import create_expert, load_expert, save_expert
from featdistill.objectives import binary_cross_entropy, dense_alignment
from featdistill.tasks import ClassifyTask, DistillTask
from featdistill.teachers import FrozenTeacher


@pytest.fixture
def expert():
    torch.manual_seed(0)
    return create_expert("tiny_clip", "random", input_size=32, head_hidden=8, head_dropout=0.0)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (2, 4, 3, 32, 32), generator=generator).to(torch.uint8)
    return {"images": images[0], "teacher_images": images[1], "label": torch.tensor([0.0, 1, 1, 0])}


def test_stage_1_is_cross_entropy_on_the_experts_logit(expert, batch):
    output = ClassifyTask(expert)(batch)
    assert output["loss"].item() == binary_cross_entropy(expert(batch["images"]), batch["label"]).item()
    assert output["logit"].shape == (4,)


@pytest.mark.parametrize("metric", ["mse", "layernorm_mse", "cosine"])
def test_stage_2_adds_the_weighted_distance_to_the_teachers_tokens(expert, batch, metric):
    teacher = copy.deepcopy(expert)
    task = DistillTask(expert, FrozenTeacher(teacher), metric=metric, dense_weight=3.0, bce_weight=0.5)
    output = task(batch)
    logit, _, (tokens,) = expert.encode(batch["images"])
    wanted = teacher.encode(batch["teacher_images"]).tokens[-1]
    bce = binary_cross_entropy(logit, batch["label"]).item()
    dense = dense_alignment(tokens, wanted, metric).item()
    assert output["bce"].item() == pytest.approx(bce) and output["dense"].item() == pytest.approx(dense)
    assert output["loss"].item() == pytest.approx(0.5 * bce + 3 * dense, rel=1e-6)
    assert dense > 0


def test_a_student_that_equals_its_teacher_has_no_distance(expert, batch):
    task = DistillTask(expert, FrozenTeacher(copy.deepcopy(expert))).eval()
    output = task(batch | {"teacher_images": batch["images"]})
    assert output["dense"].item() == pytest.approx(0, abs=1e-9)
    assert output["token_cosine"].item() == pytest.approx(1, abs=1e-6)


def test_the_teacher_stays_as_it_is(batch):
    torch.manual_seed(0)
    expert = create_expert("timm:test_efficientnet", "random", input_size=32)
    teacher = copy.deepcopy(expert)
    before = copy.deepcopy(teacher.state_dict())
    task = DistillTask(expert, FrozenTeacher(teacher)).train()
    assert expert.training and not any(module.training for module in teacher.modules())
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    task(batch)["loss"].backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    # Batch statistics as well: a teacher in training mode would move them.
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is not None for parameter in expert.parameters())


def test_checkpoint_and_saved_expert_have_no_teacher_in_them(expert, tmp_path):
    task = DistillTask(expert, FrozenTeacher(copy.deepcopy(expert)))
    assert list(task.checkpoint()) == ["expert"]
    assert task.checkpoint()["expert"].keys() == expert.state_dict().keys()
    save_expert(task.expert, tmp_path / "expert")
    assert load_expert(tmp_path / "expert").state_dict().keys() == expert.state_dict().keys()


def test_a_checkpoint_brings_the_expert_back(expert, batch):
    task = ClassifyTask(expert)
    kept = copy.deepcopy(task.checkpoint())
    expected = task(batch)["loss"].item()
    with torch.no_grad():
        expert.head[3].bias += 1
    assert task(batch)["loss"].item() != expected
    task.load_checkpoint(kept)
    assert task(batch)["loss"].item() == expected
