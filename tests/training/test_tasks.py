import copy

import pytest
import torch
from task_steps import MOMENTUM_B, READING_B, make_batch, take_steps

import distill
import train
from featdistill.command_line import UserError
from featdistill.models.expert import create_expert, load_expert, save_expert
from featdistill.recipe_groups import Distillation, Objective
from featdistill.training.objectives import binary_cross_entropy, consistency, dense_alignment
from featdistill.training.tasks import ClassifyTask, DistillTask


@pytest.fixture
def expert():
    torch.manual_seed(0)
    return create_expert("tiny_clip", "random", input_size=32, head_hidden=8, head_dropout=0.0)


@pytest.fixture
def batch():
    return make_batch(4, 2)


def reading_b(expert, **options) -> DistillTask:
    return DistillTask(expert, Distillation(**MOMENTUM_B, **options))


def test_stage_1_is_cross_entropy_on_the_experts_logit(expert, batch):
    output = ClassifyTask(expert, Objective())(batch)
    assert (
        output["loss"].item()
        == binary_cross_entropy(expert(batch["images"]), batch["label"], Objective()).item()
    )
    assert output["logit"].shape == (4,) and output["bce"].item() == output["loss"].item()


def test_stage_1_takes_the_options_of_cross_entropy(expert, batch):
    options = Objective(bce_weight=0.5, label_smoothing=0.1, focal_gamma=2.0, ai_weight=3.0)
    output = ClassifyTask(expert, options)(batch)
    wanted = binary_cross_entropy(output["logit"], batch["label"], options)
    assert output["bce"].item() == wanted.item() and output["loss"].item() == 0.5 * wanted.item()


def test_consistency_holds_the_distorted_image_to_the_clean_one(expert, batch):
    task = ClassifyTask(expert, Objective(consistency_weight=2.0))
    assert task.views == ("clean",)
    output = task(batch)
    wanted = consistency(expert(batch["images_clean"]), expert(batch["images"]))
    assert output["consistency"].item() == pytest.approx(wanted.item(), rel=1e-5) and wanted > 0
    assert output["loss"].item() == pytest.approx((output["bce"] + 2 * wanted).item(), rel=1e-6)
    output["consistency"].backward()
    gradient = expert.head[0].weight.grad.clone()
    expert.zero_grad()
    consistency(expert(batch["images_clean"]).detach(), expert(batch["images"])).backward()
    torch.testing.assert_close(gradient, expert.head[0].weight.grad)


def test_the_clean_pass_leaves_the_gradient_under_autocast(expert, batch):
    """A pass without gradient must not hand its casts of the weights to the pass that needs one."""
    with torch.autocast("cpu", torch.bfloat16):
        ClassifyTask(expert, Objective(consistency_weight=1.0))(batch)["loss"].backward()
    assert all(parameter.grad is not None for parameter in expert.parameters())


@pytest.mark.parametrize("metric", ["mse", "layernorm_mse", "cosine"])
def test_stage_2_adds_the_weighted_distance_to_the_teachers_tokens(expert, batch, metric):
    task = DistillTask(expert, Distillation(metric=metric, dense_weight=3.0, bce_weight=0.5))
    teacher = task.teacher.expert
    output = task(batch)
    logit, _, (tokens,) = expert.encode(batch["images"])
    wanted = teacher.encode(batch["images_clean"]).tokens[-1]
    bce = binary_cross_entropy(logit, batch["label"], Objective()).item()
    dense = dense_alignment(tokens, wanted, metric).item()
    assert output["bce"].item() == pytest.approx(bce) and output["dense"].item() == pytest.approx(dense)
    assert output["loss"].item() == pytest.approx(0.5 * bce + 3 * dense, rel=1e-6)
    assert dense > 0


def test_dense_alignment_may_take_several_layers(expert, batch):
    task = DistillTask(expert, Distillation(dense_layers=2, metric="mse")).eval()
    ours = expert.eval().encode(batch["images"], 2).tokens
    theirs = expert.encode(batch["images_clean"], 2).tokens
    wanted = sum(dense_alignment(s, t, "mse").item() for s, t in zip(ours, theirs, strict=True)) / 2
    assert len(ours) == 2 and task(batch)["dense"].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "view, key", [("clean", "images_clean"), ("same", "images"), ("other", "images_other")]
)
def test_the_teacher_sees_the_view_that_is_asked_for(expert, batch, view, key):
    task = DistillTask(expert, Distillation(teacher_view=view)).eval()
    wanted = dense_alignment(
        expert.encode(batch["images"]).tokens[-1], expert.encode(batch[key]).tokens[-1]
    ).item()
    assert task.views == (() if view == "same" else (view,))
    assert task({key: batch[key] for key in ("images", "label", key)})["dense"].item() == wanted


@pytest.mark.parametrize(
    "teacher_view, weight, views",
    [
        ("same", 0, ()),
        ("same", 0.5, ("clean",)),
        ("clean", 1, ("clean",)),
        ("other", 0.5, ("clean", "other")),
    ],
)
def test_views_are_those_of_the_teacher_and_of_consistency(expert, teacher_view, weight, views):
    options = Distillation(teacher_view=teacher_view, consistency_weight=weight)
    assert DistillTask(expert, options).views == views


def test_a_student_that_equals_its_teacher_has_no_distance(expert, batch):
    task = DistillTask(expert, Distillation()).eval()
    output = task(batch | {"images_clean": batch["images"]})
    assert output["dense"].item() == pytest.approx(0, abs=1e-9)
    assert output["token_cosine"].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "objective, parts",
    [
        ("dense", {"dense", "token_cosine"}),
        ("crd", {"crd", "crd_accuracy"}),
        ("dense+crd", {"dense", "token_cosine", "crd", "crd_accuracy"}),
    ],
)
def test_any_mix_of_objectives_is_weighted_and_logged(expert, batch, objective, parts):
    weights = {"bce": 0.3, "dense": 2.0, "crd": 0.7, "consistency": 0.5}
    options = MOMENTUM_B | {"objective": objective} | {f"{key}_weight": weights[key] for key in weights}
    task = DistillTask(expert, Distillation(**options))
    task(batch)
    task.after_step(0, 10)
    output = task(batch | {"index": batch["index"] + 50})
    assert output.keys() == {"loss", "logit", "bce", "consistency", *parts}
    loss = sum(weight * output[name].item() for name, weight in weights.items() if name in output)
    assert output["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert all(value.ndim == 0 for key, value in output.items() if key != "logit")
    assert all(output[name] > 0 for name in weights if name in output)
    assert (
        task.keeps_layout_only == ("dense" in objective)
        and not ClassifyTask(expert, Objective()).keeps_layout_only
    )
    with pytest.raises(UserError, match="unknown value of objective 'tokens'"):
        Distillation(objective="tokens")


def test_a_sample_that_comes_again_is_not_held_against_itself(expert, batch):
    task = reading_b(expert)
    task(batch)
    task.after_step(0, 10)
    one = {key: value[:1] for key, value in batch.items()}
    kept = task.crd.queue.ids.clone()
    task.crd.queue.ids[1:] = -1
    assert task(one)["crd"].item() == 0
    task.crd.queue.ids.copy_(kept)
    assert task(one)["crd"].item() > 0


def test_what_is_trained_is_the_expert_and_the_extra_parameters(expert, batch):
    assert ClassifyTask(expert, Objective()).extra_parameters() == []
    task = reading_b(expert, ema=0.99)
    trained = {id(p) for p in [*expert.parameters(), *task.extra_parameters()]}
    assert trained == {id(p) for p in task.parameters() if p.requires_grad}
    assert len(trained) == len(list(expert.parameters())) + 1


def test_the_teacher_stays_as_it_is(batch):
    torch.manual_seed(0)
    expert = create_expert("timm:test_efficientnet", "random", input_size=32)
    task = DistillTask(expert, Distillation()).train()
    teacher = task.teacher.expert
    before = copy.deepcopy(teacher.state_dict())
    assert expert.training and not any(module.training for module in teacher.modules())
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    task(batch)["loss"].backward()
    optimizer.step()
    task.after_step(0, 2)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    # Batch statistics as well: a teacher in training mode would move them.
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is not None for parameter in expert.parameters())


def test_a_step_that_is_not_taken_leaves_nothing(expert, batch):
    task = reading_b(expert, ema=0.9)
    before = copy.deepcopy(task.state_dict())
    task.eval()
    task.crd.train()
    task(batch)
    task.after_skip()
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    task.after_step(0, 10)
    assert task.crd.queue.filled.item() == 0


def test_the_average_is_evaluated_where_there_is_one(expert, batch):
    assert ClassifyTask(expert, Objective()).evaluated is expert
    task = ClassifyTask(expert, Objective(ema=0.9))
    with torch.no_grad():
        expert.head[3].bias += 1
    task.after_step(0, 10)
    wanted = expert.head[3].bias.item() - 0.1
    assert task.evaluated is not expert and task.evaluated.head[3].bias.item() == pytest.approx(wanted)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_saved_expert_has_no_projection_or_teacher_in_it(expert, batch, tmp_path, ema):
    task = reading_b(expert, ema=ema)
    take_steps(task, [make_batch(4, 2)])
    save_expert(task.evaluated, tmp_path / "expert")
    loaded = load_expert(tmp_path / "expert")
    assert loaded.state_dict().keys() == expert.state_dict().keys()
    wanted = task.evaluated.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in loaded.state_dict().items())


def test_a_checkpoint_holds_what_changes_and_not_a_frozen_teacher(expert):
    assert list(ClassifyTask(expert, Objective()).checkpoint()) == ["expert"]
    assert list(DistillTask(expert, Distillation()).checkpoint()) == ["expert"]
    assert list(DistillTask(expert, Distillation(**READING_B)).checkpoint()) == ["expert", "crd"]
    assert list(reading_b(expert, ema=0.9).checkpoint()) == ["expert", "average", "teacher", "crd"]


CONTINUED = {
    "stage 1 with average": lambda expert: ClassifyTask(expert, Objective(ema=0.9)),
    "reading A": lambda expert: DistillTask(expert, Distillation()),
    "reading B": reading_b,
    "reading B, frozen teacher, average": lambda expert: DistillTask(
        expert, Distillation(**READING_B, ema=0.9)
    ),
}


@pytest.mark.parametrize("make", CONTINUED.values(), ids=CONTINUED)
def test_a_checkpoint_continues_to_the_same_bits(expert, make, tmp_path):
    batches = [make_batch(8, seed) for seed in range(4)]
    other = copy.deepcopy(expert)
    whole = make(expert)
    take_steps(whole, batches[:2], total=4)
    torch.save(whole.checkpoint(), tmp_path / "state.pt")
    take_steps(whole, batches[2:], first=2, total=4)
    # Another process builds the task anew, from the same stage-1 expert.
    continued = make(other)
    continued.load_checkpoint(torch.load(tmp_path / "state.pt", weights_only=True))
    take_steps(continued, batches[2:], first=2, total=4)
    expected = whole.state_dict()
    assert continued.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in continued.state_dict().items())


FILES = ["--recipe", "demo_clip_a", "--train", "t.csv", "--val", "v.csv", "--out", "run"]


@pytest.mark.parametrize("flags", [["--teacher-kind", "momentum"], ["--ema", "0.9"]])
def test_what_follows_all_weights_does_not_go_with_low_rank_additions(flags):
    with pytest.raises(UserError, match="finetune lora does not change the weights"):
        distill.main([*FILES, "--finetune", "lora", "--teacher", "expert", *flags])
    if "--ema" in flags:
        with pytest.raises(UserError, match="finetune lora does not change the weights"):
            train.main([*FILES, "--finetune", "lora", *flags])
