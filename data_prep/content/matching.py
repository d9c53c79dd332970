"""Pairs of an AI-generated and a real image that show the same, one to one.

If both classes show the same things, a detector cannot learn from what they show. Features are centered and
made unit vectors, and the sum of the distances of all pairs is as small as possible (the Hungarian method,
scipy's `linear_sum_assignment`). Its time grows with the third power of the number of images, so a larger set
is halved along the direction in which it spreads most until its parts are small; images that a part leaves
over are then paired with each other.
"""

import numpy as np

MAX_PART = 4000


def nearest_pairs(
    ai: np.ndarray, real: np.ndarray, max_part: int = MAX_PART
) -> tuple[np.ndarray, np.ndarray]:
    """Pair each image of the smaller class with a different one of the other class.

    Args:
        ai: (N, D) features, finite.
        real: (M, D).
        max_part: images of a class that are paired at once.

    Returns:
        (K, 2) int64, rows of `ai` and `real`, in the order of `ai`, with K = min(N, M); and the distance of
        each pair, (K,) from 0 to 2.
    """
    both = np.concatenate([ai, real]).astype(np.float64)
    both -= both.mean(axis=0)
    both /= np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)
    if max(len(ai), len(real)) > max_part:
        # Turned so that the first coordinate is where the images differ most; distances stay.
        both = both @ np.linalg.eigh(np.cov(both.T))[1][:, ::-1]
    ai, real = both[: len(ai)], both[len(ai) :]
    pairs = _pairs(ai, real, np.arange(len(ai)), np.arange(len(real)), max_part)
    pairs = pairs[np.argsort(pairs[:, 0])]
    return pairs, np.linalg.norm(ai[pairs[:, 0]] - real[pairs[:, 1]], axis=1)


def _pairs(ai: np.ndarray, real: np.ndarray, own: np.ndarray, other: np.ndarray, max_part: int) -> np.ndarray:
    """Pair some rows, `own` of `ai` with `other` of `real`; return (K, 2)."""
    if not (len(own) and len(other)):
        return np.empty((0, 2), np.int64)
    if max(len(own), len(other)) <= max_part:
        return _assigned(ai, real, own, other)
    values = np.concatenate([ai[own], real[other]])
    axis = int(values.var(axis=0).argmax())
    # Ranks and not values, so that equal values are halved too.
    is_low = np.argsort(np.argsort(values[:, axis], kind="stable"), kind="stable") < len(values) // 2
    low_ai, low_real = is_low[: len(own)], is_low[len(own) :]
    found = np.concatenate(
        [
            _pairs(ai, real, own[side_ai], other[side_real], max_part)
            for side_ai, side_real in ((low_ai, low_real), (~low_ai, ~low_real))
        ]
    )
    # A half with more images of one class leaves some over, the other half may lack them.
    own, other = np.setdiff1d(own, found[:, 0]), np.setdiff1d(other, found[:, 1])
    own, other = own[np.argsort(ai[own, axis])], other[np.argsort(real[other, axis])]
    parts = max(1, -(-max(len(own), len(other)) // max_part))
    split = zip(np.array_split(own, parts), np.array_split(other, parts), strict=True)
    return np.concatenate([found, *(_assigned(ai, real, some, others) for some, others in split)])


def _assigned(ai: np.ndarray, real: np.ndarray, own: np.ndarray, other: np.ndarray) -> np.ndarray:
    # Imported late: scipy takes a while to import.
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    first, second = linear_sum_assignment(cdist(ai[own], real[other]))
    return np.stack([own[first], other[second]], axis=1)
