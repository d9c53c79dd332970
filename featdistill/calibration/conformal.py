"""Thresholds that keep a promise: split conformal prediction within one class, and what theory says of them.

Of n images of a class and one more like them, each is equally likely to have the m-th highest score. So a
threshold at the m-th highest of the n scores, m = floor(rate (n + 1)), is exceeded by the next image with a
probability of at most m / (n + 1) <= rate, whatever the distribution of the scores (Vovk, "Conditional
validity of inductive conformal predictors", ACML 2012; Angelopoulos and Bates, "A gentle introduction to
conformal prediction", 2021, section 3.2). If no two scores are equal, the share of all images like them that
exceed it has the distribution Beta(m, n + 1 - m) over calibrations. With fewer than ceil(1 / rate) - 1 images
there is no such threshold.
"""

import math

import numpy as np
from scipy.stats import beta, binomtest

# Products such as 0.05 x 20 must not fall below their whole number.
_ROUNDING = 1e-9


def images_needed(rate: float) -> int:
    """Return the smallest number of images with which a rate in (0, 1) can be promised."""
    return math.ceil(1 / rate - _ROUNDING) - 1


def upper_threshold(scores: np.ndarray, rate: float) -> float:
    """Return a threshold that at most a share `rate` of images like those with these scores exceeds.

    Args:
        scores: (N,), finite.

    Raises:
        ValueError: there are fewer than `images_needed`.
    """
    place = _place(len(scores), rate)
    return float(np.partition(scores, len(scores) - place)[len(scores) - place])


def lower_threshold(scores: np.ndarray, rate: float) -> float:
    """Return a threshold that at most a share `rate` of images like those with these scores is below."""
    return -upper_threshold(-np.asarray(scores), rate)


def expected_rate(images: int, rate: float) -> float:
    """Return the mean, over calibrations on so many images, of the share beyond the threshold."""
    return _place(images, rate) / (images + 1)


def rate_quantile(images: int, rate: float, quantile: float) -> float:
    """Return a quantile, over calibrations on so many images, of the share beyond the threshold."""
    place = _place(images, rate)
    return float(beta.ppf(quantile, place, images + 1 - place))


def rate_with_interval(hits: int, images: int) -> dict:
    """Return `n`, `hits`, `rate` and its 95 % interval (Clopper-Pearson); None for no images."""
    if not images:
        return {"n": 0, "hits": 0, "rate": None, "low": None, "high": None}
    low, high = binomtest(hits, images).proportion_ci(0.95, method="exact")
    return {"n": images, "hits": hits, "rate": hits / images, "low": float(low), "high": float(high)}


def _place(images: int, rate: float) -> int:
    """Return m: the threshold is the m-th most extreme of the scores."""
    place = math.floor(rate * (images + 1) + _ROUNDING)
    if place < 1:
        raise ValueError(f"a rate of {rate:g} needs {images_needed(rate)} images, not {images}")
    return place
