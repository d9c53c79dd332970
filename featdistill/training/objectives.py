"""Losses on logits and tokens: small pure functions with their formula and source.

All are means over images, so that the mean over equal shares of a batch (forward passes or processes) is the
loss of the whole batch, with the same gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cosine_similarity,
    layer_norm,
    logsigmoid,
    mse_loss,
)

from featdistill.recipe_groups import Objective

METRICS = ("mse", "layernorm_mse", "cosine")


def binary_cross_entropy(logit: Tensor, label: Tensor, options: Objective) -> Tensor:
    """Paper, eq. 1: -[y log p + (1 - y) log(1 - p)], p = sigmoid(logit), mean over the batch.

    With all options, the loss of an image is w (1 - p_t)^gamma CE(y', p): p_t is the probability of the
    image's true class (focal loss, Lin et al. 2017, eq. 5), y' = y (1 - s) + s / 2 (label smoothing, Szegedy
    et al. 2016, section 7), and w is `ai_weight` for AI-generated images and 1 for real ones, or, with
    `focal_alpha`, alpha and 1 - alpha. The sum is divided by the number of images: the sum of the weights
    differs between shares of a batch.

    A label between 0 and 1, as of CutMix, gives the mean of the losses of both classes, weighted by it.

    Args:
        logit: (B,) float32.
        label: (B,) float in [0, 1], 0 real, 1 AI-generated; NaN, unknown: the loss of such an image is 0.
        options: s is `label_smoothing`, gamma is `focal_gamma` (0: cross-entropy).
    """
    is_known, label = ~label.isnan(), label.nan_to_num()
    ai, real = (_loss_of_class(logit, torch.full_like(label, of_class), options) for of_class in (1, 0))
    return torch.where(is_known, label * ai + (1 - label) * real, 0).mean()


def _loss_of_class(logit: Tensor, label: Tensor, options: Objective) -> Tensor:
    """Return the (B,) losses of images whose labels are 0 or 1."""
    smoothing = options.label_smoothing
    target = label * (1 - smoothing) + smoothing / 2 if smoothing else label
    loss = binary_cross_entropy_with_logits(logit, target, reduction="none")
    if options.focal_gamma:
        # 1 - p_t is sigmoid(-z) for AI and sigmoid(z) for real; its power would have no gradient at 0.
        loss = loss * torch.exp(options.focal_gamma * logsigmoid((1 - 2 * label) * logit))
    if options.focal_alpha:
        loss = loss * (1 - options.focal_alpha + (2 * options.focal_alpha - 1) * label)
    elif options.ai_weight != 1:
        loss = loss * (1 + (options.ai_weight - 1) * label)
    return loss


def consistency(clean_logit: Tensor, distorted_logit: Tensor) -> Tensor:
    """KL(p_clean || p_distorted) of the two Bernoulli distributions, mean over the batch.

    p_c log(p_c / p_d) + (1 - p_c) log((1 - p_c) / (1 - p_d)), p = sigmoid(logit), with all logarithms from
    `logsigmoid`, so that it is finite for any logits. The clean side is a target without gradient: the
    distorted image should be seen like the clean one, not vice versa (as in UDA, Xie et al. 2020, eq. 1).

    Args:
        clean_logit: (B,) float32; no gradient.
        distorted_logit: (B,) float32; gradients flow here.
    """
    return _divergence(clean_logit.detach(), distorted_logit).mean()


def distillation(target: Tensor, logit: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p_t || p_s), p = sigmoid(logit / T), of teacher and student, mean over the batch.

    Hinton et al. 2015, section 2: divided by the temperature T, large logits still tell images apart; the
    factor keeps the size of the gradient.

    Args:
        target: (B,) float32, the teachers' logit; no gradient. NaN: unknown, the loss of such an image is 0.
        logit: (B,) float32; gradients flow here.
    """
    is_known, target = ~target.isnan(), target.detach().nan_to_num()
    loss = temperature**2 * _divergence(target / temperature, logit / temperature)
    return torch.where(is_known, loss, 0).mean()


def _divergence(target: Tensor, logit: Tensor) -> Tensor:
    """Return KL(sigmoid(target) || sigmoid(logit)) of the two Bernoulli distributions of each image."""
    ai = target.sigmoid() * (logsigmoid(target) - logsigmoid(logit))
    real = (-target).sigmoid() * (logsigmoid(-target) - logsigmoid(-logit))
    return ai + real


def dense_alignment(student: Tensor, teacher: Tensor, metric: str = "layernorm_mse") -> Tensor:
    """Distance of two token maps, mean over batch, tokens and channels, in float32.

    Args:
        student: (B, N, C); gradients flow here.
        teacher: (B, N, C); no gradient.
        metric: `mse`: the paper's eq. 2, ||student - teacher||^2, as a mean, so that its weight does not
            depend on the number of tokens; `layernorm_mse`: the same after LayerNorm without affine
            parameters on both sides (a few huge channels dominate raw CLIP tokens); `cosine`: 1 - cosine of
            the two tokens.
    """
    student, teacher = student.float(), teacher.detach().float()
    if student.shape != teacher.shape:
        raise ValueError(f"token maps differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)}")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric}; known: {', '.join(METRICS)}")
    if metric == "cosine":
        return 1 - cosine_similarity(student, teacher, dim=-1).mean()
    if metric == "layernorm_mse":
        width = student.shape[-1:]
        student, teacher = layer_norm(student, width), layer_norm(teacher, width)
    return mse_loss(student, teacher)


def layers_alignment(
    student: Sequence[Tensor], teacher: Sequence[Tensor], metric: str = "layernorm_mse"
) -> Tensor:
    """Mean of `dense_alignment` over layers, given as token maps in the same order on both sides."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([dense_alignment(*pair, metric) for pair in pairs]).mean()


@torch.no_grad()
def token_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cosine similarity of two token maps (B, N, C): near 1 they agree; a fall shows a collapse."""
    return cosine_similarity(student.float(), teacher.float(), dim=-1).mean()
