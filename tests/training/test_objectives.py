import numpy as np
import pytest
import torch

from featdistill.recipe_groups import Objective
from featdistill.training.objectives import (
    binary_cross_entropy,
    consistency,
    dense_alignment,
    layers_alignment,
    token_cosine,
)

LOGIT, LABEL = np.array([-2.0, 0.5, 3.0, -0.3, 1.4]), np.array([0.0, 1.0, 0.0, 1.0, 1.0])


def tokens(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(1, 3, (2, 5, 7)).astype(np.float32))


def reference(student: np.ndarray, teacher: np.ndarray, metric: str) -> float:
    if metric == "cosine":
        norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
        return float(np.mean(1 - (student * teacher).sum(-1) / norms))
    if metric == "layernorm_mse":
        student, teacher = (
            (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            for x in (student, teacher)
        )
    return float(np.mean((student - teacher) ** 2))


@pytest.mark.parametrize("metric", ["mse", "layernorm_mse", "cosine"])
def test_dense_alignment_equals_its_formula(metric):
    student, teacher = tokens(0), tokens(1)
    expected = reference(student.double().numpy(), teacher.double().numpy(), metric)
    assert dense_alignment(student, teacher, metric).item() == pytest.approx(expected, rel=1e-5)
    assert dense_alignment(student, student.clone(), metric).item() == pytest.approx(0, abs=1e-6)


def test_dense_alignment_gives_the_teacher_no_gradient():
    student, teacher = tokens(0).requires_grad_(), tokens(1).requires_grad_()
    dense_alignment(student, teacher, "mse").backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, 2 * (student - teacher).detach() / student.numel())


def test_dense_alignment_refuses_other_shapes_and_metrics():
    with pytest.raises(ValueError, match="differ in shape"):
        dense_alignment(tokens(0), tokens(1)[:, :3])
    with pytest.raises(ValueError, match="unknown metric"):
        dense_alignment(tokens(0), tokens(1), "l1")


def test_layernorm_mse_does_not_see_scale_and_offset_of_a_token():
    student = tokens(0)
    assert dense_alignment(student, 5 * student + 2, "layernorm_mse").item() < 1e-5
    assert dense_alignment(student, 5 * student + 2, "mse").item() > 1


def test_layers_count_alike():
    ours, wanted = [tokens(0), tokens(1)], [tokens(2), tokens(3)]
    expected = np.mean([reference(s.numpy(), t.numpy(), "mse") for s, t in zip(ours, wanted, strict=True)])
    assert layers_alignment(ours, wanted, "mse").item() == pytest.approx(expected, rel=1e-5)
    assert layers_alignment(ours[:1], wanted[:1]).item() == dense_alignment(ours[0], wanted[0]).item()
    with pytest.raises(ValueError):
        layers_alignment(ours, wanted[:1])


def sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


@pytest.mark.parametrize(
    "smoothing, gamma, weight", [(0, 0, 1), (0.1, 0, 1), (0, 2, 1), (0, 0, 0.25), (0.2, 0.5, 3)]
)
def test_binary_cross_entropy_equals_its_formula(smoothing, gamma, weight):
    p, target = sigmoid(LOGIT), LABEL * (1 - smoothing) + smoothing / 2
    entropy = -(target * np.log(p) + (1 - target) * np.log(1 - p))
    p_own = np.where(LABEL == 1, p, 1 - p)
    expected = np.mean(np.where(LABEL == 1, weight, 1) * (1 - p_own) ** gamma * entropy)
    options = Objective(label_smoothing=smoothing, focal_gamma=gamma, ai_weight=weight)
    found = binary_cross_entropy(torch.tensor(LOGIT), torch.tensor(LABEL), options)
    assert found.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gamma, alpha", [(2, 0.5), (2, 0.25), (0, 0.8)])
def test_focal_alpha_weights_ai_images_by_alpha_and_real_ones_by_its_complement(gamma, alpha):
    p_t = np.where(LABEL == 1, sigmoid(LOGIT), 1 - sigmoid(LOGIT))
    expected = np.mean(np.where(LABEL == 1, alpha, 1 - alpha) * (1 - p_t) ** gamma * -np.log(p_t))
    logit, label = torch.tensor(LOGIT), torch.tensor(LABEL)
    found = binary_cross_entropy(logit, label, Objective(focal_gamma=gamma, focal_alpha=alpha))
    assert found.item() == pytest.approx(expected, rel=1e-9)
    relative = Objective(focal_gamma=gamma, ai_weight=alpha / (1 - alpha))
    same = (1 - alpha) * binary_cross_entropy(logit, label, relative)
    assert found.item() == pytest.approx(same.item(), rel=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "focal_gamma": 2.0, "ai_weight": 3.0}, {"focal_alpha": 0.3}]
)
def test_a_label_in_between_gives_the_weighted_mean_of_both_losses(options):
    options, share = Objective(**options), np.array([0.0, 0.25, 0.5, 0.9, 1.0])
    losses = [
        [binary_cross_entropy(torch.tensor([z]), torch.tensor([y]).double(), options).item() for z in LOGIT]
        for y in (1.0, 0.0)
    ]
    expected = np.mean(share * np.array(losses[0]) + (1 - share) * np.array(losses[1]))
    found = binary_cross_entropy(torch.tensor(LOGIT), torch.tensor(share), options)
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_cross_entropy_of_a_label_in_between_is_that_of_two_probabilities():
    share, p = np.array([0.0, 0.25, 0.5, 0.9, 1.0]), sigmoid(LOGIT)
    expected = np.mean(-(share * np.log(p) + (1 - share) * np.log(1 - p)))
    found = binary_cross_entropy(torch.tensor(LOGIT), torch.tensor(share), Objective())
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_weighted_cross_entropy_of_a_batch_is_the_mean_of_its_halves():
    """Whatever the halves' shares of AI-generated images: so it is the same over several processes."""
    logit, label = torch.tensor(LOGIT[:4]), torch.tensor([0.0, 0, 1, 1])
    options = Objective(ai_weight=5.0, focal_gamma=2.0, label_smoothing=0.1)
    halves = [binary_cross_entropy(logit[s], label[s], options) for s in (slice(2), slice(2, 4))]
    whole = binary_cross_entropy(logit, label, options)
    assert (sum(halves) / 2).item() == pytest.approx(whole.item(), rel=1e-9)


def test_focal_loss_has_a_finite_gradient_for_any_logit():
    logit = torch.tensor([-200.0, 200, 0, 200, -200], requires_grad=True)
    binary_cross_entropy(logit, torch.tensor([0.0, 1, 1, 0, 1]), Objective(focal_gamma=0.5)).backward()
    assert torch.isfinite(logit.grad).all() and logit.grad[0] == 0 and logit.grad[3] > 0


def test_consistency_is_the_divergence_from_the_clean_probability():
    clean = np.array([1.0, -0.5, 0.2, 4.0, -3.0])
    p, q = sigmoid(clean), sigmoid(LOGIT)
    expected = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert consistency(torch.tensor(clean), torch.tensor(LOGIT)).item() == pytest.approx(expected, rel=1e-9)
    assert consistency(torch.tensor(clean), torch.tensor(clean)).item() == 0


def test_consistency_moves_the_distorted_side_only_and_is_finite_for_any_logits():
    clean = torch.tensor([500.0, -500, 3], requires_grad=True)
    distorted = torch.tensor([-500.0, 500, 1], requires_grad=True)
    loss = consistency(clean, distorted)
    loss.backward()
    assert clean.grad is None and loss.item() == pytest.approx(1000 / 3, rel=1e-2)
    # The gradient of KL(p || sigmoid(z)) by z is sigmoid(z) - p.
    wanted = (torch.sigmoid(distorted) - torch.sigmoid(clean)).detach() / 3
    torch.testing.assert_close(distorted.grad, wanted)


def test_token_cosine_is_one_for_parallel_and_minus_one_for_opposite_tokens():
    assert token_cosine(tokens(0), 3 * tokens(0)).item() == pytest.approx(1, abs=1e-6)
    assert token_cosine(tokens(0), -tokens(0)).item() == pytest.approx(-1, abs=1e-6)
