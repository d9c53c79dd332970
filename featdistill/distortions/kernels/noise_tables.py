"""Noise by table: uniform random bits look up what they stand for, which is faster than any sampler.

Noise that does not depend on the pixel is a table of quantiles that is added. Noise that does, such as that
of counted photons, has a table of quantiles for each of the 256 values.
"""

from collections.abc import Callable
from functools import cache
from statistics import NormalDist

import cv2
import numpy as np

from featdistill.distortions.kernels.scratch import in_strips

_OUTCOMES = 1 << 12


def random_bytes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return `count` uniform uint8, the fastest way a generator has."""
    return rng.integers(0, 2**64, -(-count // 8), dtype=np.uint64).view(np.uint8)[:count]


@cache
def normal_quantiles(count: int) -> np.ndarray:
    """Return (count,) float64 quantiles of N(0, 1), at the middles of equal shares, scaled to variance 1."""
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    return quantiles / quantiles.std()


@cache
def gaussian_table(sigma: float) -> np.ndarray:
    """Return (65536,) int16 noise of N(0, sigma^2) in steps of 255, by 16 uniform bits.

    Exact after rounding but for tails beyond 4.3 sigma.
    """
    return np.rint(sigma * normal_quantiles(1 << 16)).astype(np.int16)


def add_noise(image: np.ndarray, table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add to every sample an independent entry of a table.

    Args:
        image: (H, W, 3) uint8.
        table: (65536,) int16.

    Returns:
        (H, W, 3) uint8, a new array.
    """

    def noisy(strip: np.ndarray) -> np.ndarray:
        draws = random_bytes(rng, 2 * strip.size).view(np.uint16)
        return cv2.add(strip, np.take(table, draws).reshape(strip.shape), dtype=cv2.CV_8U)

    return in_strips(noisy, image)


def response_table(outcomes: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """Tabulate what a noisy sensor gives for each of the 256 values.

    Args:
        outcomes: from the values (256, 1) float64 in [0, 1] and a number n to n equally likely outcomes of
            each, (256, n) float in [0, 1]; clipped here.

    Returns:
        (256 * 4096,) uint8 for `draw_responses`.
    """
    values = np.arange(256)[:, None] / 255
    return np.rint(255 * np.clip(outcomes(values, _OUTCOMES), 0, 1)).astype(np.uint8).reshape(-1)


def draw_responses(image: np.ndarray, table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Replace every sample by one of the outcomes of its value, drawn independently.

    Args:
        image: (H, W, 3) uint8.
        table: what `response_table` returned.

    Returns:
        (H, W, 3) uint8, a new array.
    """

    def respond(strip: np.ndarray) -> np.ndarray:
        places = strip.astype(np.int64)
        places *= _OUTCOMES
        draws = random_bytes(rng, 2 * strip.size).view(np.uint16).reshape(strip.shape)
        places += draws & (_OUTCOMES - 1)
        return np.take(table, places)

    return in_strips(respond, image)


def poisson_quantiles(means: np.ndarray, count: int) -> np.ndarray:
    """Return quantiles of Poisson distributions, at the middles of equal shares.

    Args:
        means: (N, 1) float64, 0 or more.
        count: number of quantiles of each.

    Returns:
        (N, count) float64 whole numbers.
    """
    most = float(means.max())
    numbers = np.arange(int(most + 10 * most**0.5) + 20)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(numbers[1:]))])
    shares = (np.arange(count) + 0.5) / count
    rows = []
    for mean in means[:, 0]:
        mass = np.exp(numbers * np.log(max(mean, 1e-300)) - mean - log_factorial)
        rows.append(np.searchsorted(np.cumsum(mass), shares))
    return np.stack(rows).astype(np.float64)
