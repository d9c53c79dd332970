"""Bootstrap intervals of ROC AUCs: how far another sample of images could have moved them.

Stratified: each draw takes as many real and as many AI-generated images as there are, of each class with
replacement. Intervals are percentile intervals of 95 %. Nothing is approximated: a draw's AUC is the one over
the images drawn, ties counted half.

A draw costs one pass over the images. Images are sorted once; what a draw changes is how often each real
image is there, and the running sum of that, looked up at the place of an AI-generated image, is how many real
ones it beats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
# Draws of small sets are made many at a time, as many as keep the arrays within a core's own cache.
_CELLS = 2**16
_BLOCK = 2**16


@dataclass(frozen=True)
class Resampling:
    """How draws are made: their number, 0 for no intervals, and what seeds them."""

    draws: int = 1000
    seed: int = 0


def auc_draws(real: np.ndarray, ai: Sequence[np.ndarray], resampling: Resampling) -> list[np.ndarray]:
    """Return the AUC of each draw.

    Args:
        real: (M, R) scores of R real images by M models; every model sees the same draw, so that differences
            of their AUCs are paired.
        ai: for each group of AI-generated images (M, A) their scores. The groups share the draws of the real
            images, which changes no group's values and saves most of the work.

    Returns:
        For each group (M, draws) float64.

    Raises:
        ValueError: there is no real image, or a group has no image.
    """
    real, groups = np.asarray(real), [np.asarray(group) for group in ai]
    if not real.size or any(not group.size for group in groups):
        raise ValueError("an AUC takes images of both classes")
    # In the order of the first model's scores memory is read nearly in sequence.
    real = real[:, np.argsort(real[0], kind="stable")]
    groups = [group[:, np.argsort(group[0], kind="stable")] for group in groups]
    orders = [None if model == 0 else np.argsort(row, kind="stable") for model, row in enumerate(real)]
    places = [[_places(*pair) for pair in zip(real, group, strict=True)] for group in groups]
    # One generator a class and group, so that what a group draws depends neither on the others nor on how
    # many draws are made at a time.
    real_rng = np.random.default_rng([resampling.seed, 0])
    ai_rngs = [np.random.default_rng([resampling.seed, 1]) for _ in groups]
    found = [np.empty((len(real), resampling.draws)) for _ in groups]
    images = real.shape[1]
    most = max(images, *(group.shape[1] for group in groups))
    at_once = max(1, min(resampling.draws, _CELLS // most))
    below = np.zeros((at_once, images + 1), dtype=np.intp)
    for start in range(0, resampling.draws, at_once):
        draws = min(at_once, resampling.draws - start)
        below = below[:draws]
        counts = times_drawn(real_rng, draws, images)
        drawn = [times_drawn(rng, draws, group.shape[1]) for rng, group in zip(ai_rngs, groups, strict=True)]
        for model, order in enumerate(orders):
            np.cumsum(counts if order is None else counts[:, order], axis=1, out=below[:, 1:])
            for group, times in enumerate(drawn):
                won = _twice_won(below, *places[group][model])
                # Whole numbers up to here: the division is the only rounding.
                share = np.vecdot(times, won) / (2 * times.shape[1] * images)
                found[group][model, start : start + draws] = share
    return found


def times_drawn(rng: np.random.Generator, draws: int, images: int) -> np.ndarray:
    """Return how often each image is there in each draw of `images` of them with replacement.

    Returns:
        (draws, images) integers; every row adds up to `images`.
    """
    if images < _BLOCK:
        rows = rng.integers(0, images, (draws, images))
        rows += np.arange(draws)[:, None] * images
        return np.bincount(rows.reshape(-1), minlength=draws * images).reshape(draws, images)
    # The same distribution in two steps: how many fall into each block, then where in it. A block's counts
    # stay in the cache, and a place in a block of 2^16 is a quarter of what the generator gives at once.
    counts = np.empty((draws, images), dtype=np.intp)
    blocks = [min(_BLOCK, images - first) for first in range(0, images, _BLOCK)]
    for row in counts:
        first = 0
        for size, drawn in zip(blocks, rng.multinomial(images, np.array(blocks) / images), strict=True):
            if size == _BLOCK:
                places = rng.bit_generator.random_raw(-(-drawn // 4)).view(np.uint16)[:drawn]
            else:
                places = rng.integers(0, size, drawn)
            row[first : first + size] = np.bincount(places, minlength=size)
            first += size
    return counts


def interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """Return the percentile interval of the draws (D,); None twice where there are none."""
    if not len(values):
        return None, None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def model_draws(label: np.ndarray, scores: np.ndarray, resampling: Resampling) -> np.ndarray:
    """Return the AUCs of M models over the same images in each draw.

    Args:
        label: (N,) 0 or 1.
        scores: (M, N), finite.

    Returns:
        (M, draws) float64; (M, 0) where one of the classes is missing or no draws are wanted.
    """
    label, scores = np.asarray(label), np.asarray(scores, dtype=np.float64)
    if not resampling.draws or not len(scores) or len(np.unique(label)) < 2:
        return np.empty((len(scores), 0))
    return auc_draws(scores[:, label == 0], [scores[:, label == 1]], resampling)[0]


def auc_interval(
    label: np.ndarray, score: np.ndarray, resampling: Resampling
) -> tuple[float | None, float | None]:
    """Return the interval of the AUC of (N,) scores; None twice where `model_draws` has no values."""
    return interval(model_draws(label, np.asarray(score)[None], resampling)[0])


def _places(real: np.ndarray, ai: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return for each AI-generated image how many real ones have a lower, and a lower or equal, score.

    The second is None where no score of the two classes ties.
    """
    ordered = np.sort(real)
    lower, not_higher = np.searchsorted(ordered, ai, "left"), np.searchsorted(ordered, ai, "right")
    return lower, None if (lower == not_higher).all() else not_higher


def _twice_won(below: np.ndarray, lower: np.ndarray, not_higher: np.ndarray | None) -> np.ndarray:
    """Return twice the number of drawn real images that each AI-generated one beats, ties half."""
    won = below.take(lower, axis=1)
    won += won if not_higher is None else below.take(not_higher, axis=1)
    return won
