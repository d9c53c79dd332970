import numpy as np
import pytest
import torch

from featdistill.objectives import binary_cross_entropy, dense_alignment, token_cosine


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


def test_binary_cross_entropy_equals_eq_1():
    logit, label = np.array([-2.0, 0.5, 3.0]), np.array([0.0, 1.0, 0.0])
    probability = 1 / (1 + np.exp(-logit))
    expected = -np.mean(label * np.log(probability) + (1 - label) * np.log(1 - probability))
    found = binary_cross_entropy(torch.tensor(logit), torch.tensor(label))
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_token_cosine_is_one_for_parallel_and_minus_one_for_opposite_tokens():
    assert token_cosine(tokens(0), 3 * tokens(0)).item() == pytest.approx(1, abs=1e-6)
    assert token_cosine(tokens(0), -tokens(0)).item() == pytest.approx(-1, abs=1e-6)
