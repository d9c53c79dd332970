"""Losses: small pure functions with their formula and source."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity, layer_norm, mse_loss

METRICS = ("mse", "layernorm_mse", "cosine")


def binary_cross_entropy(logit: Tensor, label: Tensor) -> Tensor:
    """Paper, eq. 1: -[y log p + (1 - y) log(1 - p)], p = sigmoid(logit), mean over the batch.

    Args:
        logit: (B,) float32.
        label: (B,) float, 0 real, 1 AI-generated.
    """
    return binary_cross_entropy_with_logits(logit, label)


def dense_alignment(student: Tensor, teacher: Tensor, metric: str = "layernorm_mse") -> Tensor:
    """Distance of two token maps, mean over batch, tokens and channels, in float32.

    Args:
        student: (B, N, C); gradients flow here.
        teacher: (B, N, C); no gradient.
        metric: `mse`: the paper's eq. 2, ||student - teacher||^2, as a mean, so that its weight does not
            depend on the number of tokens; `layernorm_mse`: the same after LayerNorm without affine
            parameters on both sides (raw CLIP tokens are ruled by a few huge channels); `cosine`: 1 - cosine
            of the two tokens.
    """
    student, teacher = student.float(), teacher.detach().float()
    if student.shape != teacher.shape:
        raise ValueError(f"token maps differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)}")
    if metric == "mse":
        return mse_loss(student, teacher)
    if metric == "layernorm_mse":
        width = student.shape[-1:]
        return mse_loss(layer_norm(student, width), layer_norm(teacher, width))
    if metric == "cosine":
        return 1 - cosine_similarity(student, teacher, dim=-1).mean()
    raise ValueError(f"unknown metric {metric}; known: {', '.join(METRICS)}")


@torch.no_grad()
def token_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cosine similarity of two token maps (B, N, C): near 1 they agree; a fall shows a collapse."""
    return cosine_similarity(student.float(), teacher.float(), dim=-1).mean()
