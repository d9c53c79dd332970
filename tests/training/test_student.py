"""One step of a student: its losses against a few lines of NumPy, and what it asks of the data set."""

import numpy as np
import pytest
import torch
from scipy.special import expit, log_expit

from featdistill.command_line import UserError
from featdistill.data.preprocessing import Preprocessing
from featdistill.data.train_dataset import input_name
from featdistill.inference.fusion import Fusion
from featdistill.models.expert import create_expert
from featdistill.models.masking import make_masking
from featdistill.recipe_groups import Masking, Objective, Student
from featdistill.records.logits import logits_of
from featdistill.training.objectives import binary_cross_entropy, dense_alignment, distillation
from featdistill.training.student import StudentTask, Teachers, fused_logit, resize_tokens

NAMES = ("a", "b")
FUSIONS = {
    "probabilities": Fusion("probability_mean"),
    "logits": Fusion("logit_mean"),
    "weights": Fusion("probability_mean", {"a": 3.0, "b": 1.0}),
    "temperatures": Fusion("logit_mean", {"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 0.5}),
    "one is left out": Fusion("probability_mean", {"a": 0.0, "b": 1.0}),
}


@pytest.mark.parametrize("name", FUSIONS)
def test_the_fused_logit_is_that_of_the_fusion(name):
    logits = np.random.default_rng(0).normal(0, 5, (2, 50))
    found = fused_logit(torch.tensor(logits), FUSIONS[name], NAMES)
    np.testing.assert_allclose(found, logits_of(FUSIONS[name].apply(logits, NAMES)), rtol=1e-9, atol=1e-9)


def test_the_fused_logit_is_finite_where_probabilities_are_not_below_1():
    found = fused_logit(torch.tensor([[1000.0, -1000.0], [900.0, 0.0]]), Fusion(), NAMES)
    # Means of 1 - e^-1000 and 1 - e^-900, and of e^-1000 and 1/2: odds of 1/4 to 3/4.
    assert found.tolist() == pytest.approx([900 + np.log(2), -np.log(3)], rel=1e-6)
    with pytest.raises(UserError, match="no weight for expert b"):
        fused_logit(torch.zeros(2, 3), Fusion(weights={"a": 1.0}), NAMES)


TARGET, LOGIT = np.array([-3.0, 0.4, 2.5, 8.0]), np.array([1.0, -0.3, 2.0, -1.5])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_equals_its_formula(temperature):
    target, logit = TARGET / temperature, LOGIT / temperature
    kl = expit(target) * (log_expit(target) - log_expit(logit))
    kl += expit(-target) * (log_expit(-target) - log_expit(-logit))
    found = distillation(torch.tensor(TARGET), torch.tensor(LOGIT), temperature)
    assert found.item() == pytest.approx(np.mean(temperature**2 * kl), rel=1e-9)


def test_at_high_temperature_distillation_is_half_the_squared_distance_of_logits_over_4():
    """Hinton et al. 2015, section 2.1, for two classes: p (1 - p) = 1/4, and T^2 KL -> (z_t - z_s)^2 / 8."""
    found = distillation(torch.tensor(TARGET), torch.tensor(LOGIT), 1000.0)
    assert found.item() == pytest.approx(np.mean((TARGET - LOGIT) ** 2) / 8, rel=1e-3)


def test_what_is_not_known_has_no_loss_and_no_gradient():
    logit = torch.tensor(LOGIT, requires_grad=True)
    label, target = torch.tensor([0.0, np.nan, 1.0, np.nan]), torch.tensor([np.nan, 0.4, np.nan, 8.0])
    bce = binary_cross_entropy(logit, label, Objective(focal_gamma=2.0, ai_weight=3.0))
    known = binary_cross_entropy(logit[[0, 2]], label[[0, 2]], Objective(focal_gamma=2.0, ai_weight=3.0))
    # A mean over all images, known or not.
    assert bce.item() == pytest.approx(known.item() / 2)
    distill = distillation(target, logit, 2.0)
    assert distill.item() == pytest.approx(distillation(target[[1, 3]], logit[[1, 3]], 2.0).item() / 2)
    gradients = [torch.autograd.grad(loss, logit)[0] for loss in (bce, distill)]
    assert [gradient.ne(0).tolist() for gradient in gradients] == [
        [True, False, True, False],
        [False, True, False, True],
    ]


def test_tokens_are_interpolated_as_maps():
    columns = torch.arange(4.0).repeat(4)[None, :, None]  # each token holds its column
    assert torch.equal(resize_tokens(columns, 4), columns)
    half = resize_tokens(torch.cat([columns, 0 * columns + 5], 2), 2)
    assert half.shape == (1, 4, 2) and half[0, :, 1].tolist() == pytest.approx([5] * 4)
    left, right = half[0, :2, 0].tolist()
    assert left + right == pytest.approx(3) and 0 < left < 1 and half[0, 2:, 0].tolist() == [left, right]


def tiny(name: str, size: int, seed: int, resize: str = "squash"):
    torch.manual_seed(seed)
    return create_expert(name, "random", input_size=size, resize=resize, head_hidden=8, head_dropout=0.0)


@pytest.fixture
def student():
    return tiny("timm:test_vit", 32, 0)


@pytest.fixture
def teachers():
    """One with the student's input, one with a larger one."""
    return Teachers({"a": tiny("tiny_siglip", 32, 1), "b": tiny("tiny_clip", 64, 2)}, Fusion())


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    names = {"images": 32, "images_clean": 32}
    names |= {input_name(view, (64, "squash")): 64 for view in names}
    images = {name: torch.randint(0, 256, (4, 3, px, px), generator=generator) for name, px in names.items()}
    batch = {name: pixels.to(torch.uint8) for name, pixels in images.items()}
    return batch | {"label": torch.tensor([0.0, 1.0, np.nan, np.nan]), "epoch": torch.zeros(4).long()}


def wanted_target(teachers, batch, view):
    """The fused logit and the tokens of the two teachers for one view."""
    a, b = (teacher.eval() for teacher in teachers.experts)
    encoded = [a.encode(batch[view]), b.encode(batch[input_name(view, (64, "squash"))])]
    logits = np.stack([one.logit.detach().numpy() for one in encoded])
    fused = torch.tensor(logits_of(Fusion().apply(logits, NAMES)), dtype=torch.float32)
    return fused, [one.tokens[-1] for one in encoded]


CASES = [
    ("both", "view", {"images": "images", "images_clean": "images_clean"}),
    ("both", "auto", {"images": "images", "images_clean": "images_clean"}),
    ("both", "clean", {"images": "images_clean", "images_clean": "images_clean"}),
    ("distorted", "view", {"images": "images"}),
    ("distorted", "clean", {"images": "images_clean"}),
    ("clean", "view", {"images_clean": "images_clean"}),
]


@pytest.mark.parametrize("compared, target, pairs", CASES)
def test_the_loss_is_that_of_labels_logits_and_tokens(student, teachers, batch, compared, target, pairs):
    options = {"distill_views": compared, "distill_target": target, "distill_temperature": 3.0}
    weights = {"bce_weight": 0.5, "distill_weight": 2.0, "token_weight": 0.3}
    task = StudentTask(student, Student(**options, **weights), teachers).eval()
    output = task(batch)
    bce = binary_cross_entropy(student(batch["images"]), batch["label"], Objective()).item()
    distill, tokens = [], []
    for view, seen in pairs.items():
        logit, _, (own,) = student.encode(batch[view])
        wanted, theirs = wanted_target(teachers, batch, seen)
        distill.append(distillation(wanted, logit, 3.0).item())
        projected = [projection(own) for projection in task.extras["projections"]]
        same = [resize_tokens(one, 2) for one in theirs]
        distances = [dense_alignment(*pair).item() for pair in zip(projected, same, strict=True)]
        tokens.append(np.mean(distances))
    loss = 0.5 * bce + 2 * np.mean(distill) + 0.3 * np.mean(tokens)
    assert output["loss"].item() == pytest.approx(loss, rel=1e-5, abs=1e-6) and output["bce"].item() == bce
    names = [{"images": "distill", "images_clean": "distill_clean"}[view] for view in pairs]
    # The divergence of nearly equal probabilities is small in float32.
    assert [output[name].item() for name in names] == pytest.approx(distill, abs=1e-6)
    sees_clean = "images_clean" in [*pairs, *pairs.values()]
    assert task.views == (("clean",) if sees_clean else ())
    assert task.inputs == {view: [(64, "squash")] for view in pairs.values()}
    assert task.keeps_layout_only == (target == "clean")


def test_images_without_a_label_have_no_label_loss(student, teachers, batch):
    def gradient(labels, **weights):
        student.zero_grad()
        StudentTask(student, Student(**weights), teachers)(batch | {"label": labels})["loss"].backward()
        return student.head[0].weight.grad.clone()

    unknown = torch.full((4,), np.nan)
    assert not gradient(unknown, distill_weight=0.0).any()
    assert torch.equal(gradient(unknown), gradient(torch.ones(4), bce_weight=0.0))
    assert gradient(torch.ones(4), distill_weight=0.0).any()


def test_stored_targets_stand_for_the_teachers(student, teachers, batch):
    task = StudentTask(student, Student(), None).eval()
    assert task.inputs == {} and task.views == ("clean",) and not task.keeps_layout_only
    target, _ = wanted_target(teachers, batch, "images_clean")
    stored = task(batch | {"targets": target})
    live = StudentTask(student, Student(distill_target="clean"), teachers).eval()(batch)
    for part in ("loss", "distill", "distill_clean"):
        assert stored[part].item() == pytest.approx(live[part].item(), abs=1e-6)
    assert StudentTask(student, Student(distill_views="distorted"), None).views == ()
    for options in ({"distill_target": "view"}, {"token_weight": 1.0}):
        with pytest.raises(UserError, match="needs the teachers themselves"):
            StudentTask(student, Student(**options), None)


def test_stored_targets_of_distorted_views_are_those_of_the_epoch(student, batch):
    targets, epoch = torch.arange(12.0).reshape(4, 3) - 5, torch.tensor([0, 1, 2, 5])
    batch |= {"targets": targets, "epoch": epoch}
    output = StudentTask(student, Student(), None, drawn=2).eval()(batch)
    wanted = distillation(torch.tensor([-4.0, 0, 2, 6]), student(batch["images"]))
    assert output["distill"].item() == pytest.approx(wanted.item(), rel=1e-5)
    wanted = distillation(targets[:, 0], student(batch["images_clean"]))
    assert output["distill_clean"].item() == pytest.approx(wanted.item(), rel=1e-5)
    task = StudentTask(student, Student(distill_target="clean", distill_views="distorted"), None, drawn=2)
    wanted = distillation(targets[:, 0], student(batch["images"]))
    assert task.eval()(batch)["distill"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_tokens_that_masking_drops_are_not_compared(student, teachers, batch):
    masks = Masking(mask="random", mask_level="token", mask_ratio=0.5)
    masking = make_masking(student, masks, 0)
    batch["index"] = torch.arange(4)
    task = StudentTask(student, Student(token_weight=1.0, distill_views="distorted"), teachers, masking)
    output = task(batch)
    _, keep = masking(batch)
    _, _, (own,) = student.encode(batch["images"], keep=keep)
    _, theirs = wanted_target(teachers, batch, "images")
    distances = []
    for projection, wanted in zip(task.extras["projections"], theirs, strict=True):
        kept = torch.stack([row[at] for row, at in zip(resize_tokens(wanted, 2), keep, strict=True)])
        distances.append(dense_alignment(projection(own), kept).item())
    assert keep.shape == (4, 2) and output["tokens"].item() == pytest.approx(np.mean(distances), rel=1e-5)


def test_only_the_student_and_the_projections_are_trained_and_kept(student, teachers, batch):
    task = StudentTask(student, Student(token_weight=1.0, ema=0.9), teachers).train()
    assert not any(module.training for teacher in teachers.each for module in teacher.modules())
    trained = {id(p) for p in [*student.parameters(), *task.extra_parameters()]}
    assert trained == {id(p) for p in task.parameters() if p.requires_grad}
    assert len(task.extra_parameters()) == 4
    before = {key: value.clone() for key, value in teachers.state_dict().items()}
    task(batch)["loss"].backward()
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
    assert all(torch.equal(value, before[key]) for key, value in teachers.state_dict().items())
    assert list(task.checkpoint()) == ["expert", "average", "extras"]
    assert list(StudentTask(student, Student(), teachers).checkpoint()) == ["expert"]


@pytest.mark.parametrize(
    ("name", "size", "resize", "message"),
    [
        ("tiny_clip", 32, "shorter", "--resize shorter"),
        ("tiny_clip", 64, "crop", "--resize crop --input-size 64"),
    ],
)
def test_tokens_of_another_part_of_the_image_are_refused(student, name, size, resize, message):
    teachers = Teachers({"a": tiny(name, size, 1, resize)}, Fusion())
    StudentTask(student, Student(), teachers)
    with pytest.raises(UserError, match=f"teacher a sees another part of an image.*{message}$"):
        StudentTask(student, Student(token_weight=1.0), teachers)


def test_preprocessing_of_a_teacher_that_differs_in_its_limit_is_another_input(student):
    teacher = tiny("tiny_clip", 32, 1)
    task = StudentTask(student, Student(distill_views="distorted"), Teachers({"a": teacher}, Fusion()))
    assert task.inputs == {"images": []}
    teacher.preprocessing = Preprocessing(32, "squash", teacher.backbone.mean, teacher.backbone.std, 90)
    assert task.inputs == {"images": [(32, "squash", 90)]}
    student.preprocessing = teacher.preprocessing
    assert task.inputs == {"images": []}
