import copy

import pytest
import torch
from torch import nn

from featdistill.inference import compute
from featdistill.models.expert import create_expert
from featdistill.recipe_groups import Distillation
from featdistill.training.tasks import DistillTask
from featdistill.training.teachers import (
    FrozenTeacher,
    MomentumTeacher,
    cast_frozen,
    follow,
    momentum_at,
)


@pytest.fixture
def expert():
    torch.manual_seed(0)
    return create_expert("tiny_clip", "random", input_size=32, head_hidden=8)


def moved(expert):
    """The expert after a change of all weights and BatchNorm statistics."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in [*expert.parameters(), *(b for b in expert.buffers() if b.is_floating_point())]:
            values.add_(torch.randn(values.shape, generator=generator))
    return expert


def test_the_momentum_goes_from_base_to_most_on_a_cosine():
    values = [momentum_at(step, 200, 0.99, 0.9999) for step in (0, 100, 200)]
    assert values == pytest.approx([0.99, 0.99495, 0.9999], abs=1e-12)
    curve = [momentum_at(step, 200, 0.99, 0.9999) for step in range(201)]
    assert curve == sorted(curve)


def test_following_is_an_interpolation_of_weights_and_a_copy_of_buffers():
    follower, source = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        source.weight.copy_(torch.tensor([5.0, 1, -3]))
    source.running_mean.fill_(7)
    source.num_batches_tracked.fill_(9)
    follow(follower, source, 0.75)
    assert follower.weight.tolist() == [2.0, 1.0, 0.0]
    assert follower.running_mean.tolist() == [7, 7, 7] and follower.num_batches_tracked.item() == 9


def test_a_momentum_teacher_starts_as_the_expert_and_follows_the_student(expert):
    teacher = MomentumTeacher(copy.deepcopy(expert))
    start = copy.deepcopy(expert.state_dict())
    assert all(torch.equal(value, start[key]) for key, value in teacher.expert.state_dict().items())
    moved(expert)
    teacher.follow(expert, 0.9)
    parameters = dict(expert.named_parameters())
    for key, value in teacher.expert.state_dict().items():
        wanted = 0.9 * start[key] + 0.1 * parameters[key] if key in parameters else expert.state_dict()[key]
        torch.testing.assert_close(value, wanted.detach())


@pytest.mark.parametrize("kind", [FrozenTeacher, MomentumTeacher])
def test_a_teacher_is_in_evaluation_mode_for_good_and_has_no_gradient(expert, kind):
    teacher = kind(copy.deepcopy(expert).train())
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    encoded = teacher(images)
    wanted = expert.eval().encode(images)
    assert torch.equal(encoded.logit, wanted.logit) and torch.equal(encoded.feature, wanted.feature)
    assert torch.equal(encoded.tokens[-1], wanted.tokens[-1])
    assert not any(values.requires_grad for values in (encoded.logit, encoded.feature, *encoded.tokens))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_frozen_teacher_does_not_follow(expert):
    teacher = FrozenTeacher(copy.deepcopy(expert))
    start = copy.deepcopy(teacher.state_dict())
    teacher.follow(moved(expert), 0.5)
    assert all(torch.equal(value, start[key]) for key, value in teacher.state_dict().items())


def stage_2(expert, kind: str = "frozen", precision: str = "bf16") -> DistillTask:
    """A task of the expert, ready to run in a precision."""
    task = DistillTask(copy.deepcopy(expert), Distillation(teacher_kind=kind))
    cast_frozen(task, precision)
    return task


def types_of(module: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


def test_only_the_backbone_of_a_frozen_teacher_is_cast_and_only_in_bf16(expert):
    task = stage_2(expert)
    assert types_of(task.teacher.expert.backbone) == {torch.bfloat16}
    assert types_of(task.teacher.expert.head) == types_of(task.expert) == {torch.float32}
    for kind, precision in (("momentum", "bf16"), ("frozen", "fp16"), ("frozen", "fp32")):
        assert types_of(stage_2(expert, kind, precision)) == {torch.float32}


def test_a_cast_teacher_computes_what_is_scored_in_bf16_and_nearly_what_it_was(expert):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    cast, plain = stage_2(expert).teacher, stage_2(expert, precision="fp16").teacher
    scored = compute.cast(copy.deepcopy(expert).eval(), "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        found, before = cast(images), plain(images)
    with torch.no_grad():
        assert torch.equal(found.logit, scored(images)) and found.logit.dtype == torch.float32
    assert found.tokens[-1].dtype == torch.bfloat16
    torch.testing.assert_close(found.logit, before.logit, atol=0.01, rtol=0)
    torch.testing.assert_close(found.tokens[-1].float(), before.tokens[-1].float(), atol=0.1, rtol=0)


def test_a_step_with_a_cast_teacher_trains_the_student_alone(expert):
    task = stage_2(expert).train()
    batch = {
        "images": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8),
        "images_clean": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8),
        "label": torch.tensor([0.0, 1, 0, 1]),
    }
    with torch.autocast("cpu", torch.bfloat16):
        output = task(batch)
    assert output["dense"] > 0 and output["loss"].isfinite()
    output["loss"].backward()
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    assert all(p.grad.isfinite().all() for p in task.expert.parameters() if p.grad is not None)
    assert "teacher" not in task.checkpoint()
