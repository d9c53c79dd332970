"""Noise by table: uniform random bits index a table of outcomes, which is faster than any sampler.

Noise that does not depend on the pixel is a table of quantiles that is added. Noise that does, such as photon
noise, has a table of quantiles for each of the 256 values.
"""

from collections.abc import Callable
from functools import cache

import cv2
import numpy as np

from featdistill.distortions.kernels.scratch import in_strips

_OUTCOMES = 1 << 12


def random_bytes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return `count` uniform uint8, drawn the fastest way a generator offers."""
    return rng.integers(0, 2**64, -(-count // 8), dtype=np.uint64).view(np.uint8)[:count]


def smooth_noise(
    height: int, width: int, sigma_px: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Draw smoothed white noise, (H, W) uint8, nearly normal around 127.5; returns its deviation too."""
    reach = int(np.ceil(3 * sigma_px))
    # Smoothed beyond the image: replicated edges would have a larger deviation.
    shape = (height + 2 * reach, width + 2 * reach)
    white = random_bytes(rng, shape[0] * shape[1]).reshape(shape)
    side = 2 * reach + 1
    smooth = cv2.GaussianBlur(white, (side, side), sigma_px)[reach:-reach, reach:-reach]
    taps = cv2.getGaussianKernel(side, sigma_px)
    return smooth, ((256**2 - 1) / 12) ** 0.5 * float((taps**2).sum())


def middle_shares(count: int) -> np.ndarray:
    """Return the middles of `count` equal shares of [0, 1], as (count,) float64."""
    return (np.arange(count) + 0.5) / count


@cache
def normal_quantiles(count: int) -> np.ndarray:
    """Return (count,) float64 quantiles of N(0, 1), scaled to variance 1."""
    from scipy.special import ndtri  # here, because it takes a quarter of a second to import

    quantiles = ndtri(middle_shares(count))
    return quantiles / quantiles.std()


def poisson_quantiles(means: np.ndarray, count: int) -> np.ndarray:
    """Return quantiles of Poisson distributions, (N, count) float64, for means (N, 1) of 0 or more."""
    from scipy.special import pdtr

    largest = float(means.max())
    numbers = np.arange(int(largest + 10 * largest**0.5) + 20)
    shares = middle_shares(count)
    rows = [np.searchsorted(cumulative, shares) for cumulative in pdtr(numbers, means)]
    return np.stack(rows).astype(np.float64)


@cache
def gaussian_table(sigma: float) -> np.ndarray:
    """Return (65536,) int16 noise of N(0, sigma^2), exact after rounding up to tails beyond 4.3 sigma."""
    return np.rint(sigma * normal_quantiles(1 << 16)).astype(np.int16)


def add_noise(image: np.ndarray, table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add a random entry of a (65536,) int16 table to every sample; returns a new (H, W, 3) uint8."""

    def noisy(strip: np.ndarray) -> np.ndarray:
        draws = random_bytes(rng, 2 * strip.size).view(np.uint16)
        return cv2.add(strip, np.take(table, draws).reshape(strip.shape), dtype=cv2.CV_8U)

    return in_strips(noisy, image)


def response_table(outcomes: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """Tabulate what a noisy sensor returns for each of the 256 values: (256 * 4096,) uint8.

    `outcomes` takes the values, (256, 1) float64 in [0, 1], and a number n; it returns n equally likely
    outcomes of each, (256, n) float, which are clipped to [0, 1].
    """
    values = np.arange(256)[:, None] / 255
    return np.rint(255 * np.clip(outcomes(values, _OUTCOMES), 0, 1)).astype(np.uint8).reshape(-1)


@cache
def photon_table(photons: float, gamma: float = 1.0, gain: float = 1.0) -> np.ndarray:
    """Return the responses of a sensor that counts `photons` for white and amplifies by `gain`.

    Values are light to the power of 1 / gamma.
    """

    def counted(value: np.ndarray, count: int) -> np.ndarray:
        return (gain * poisson_quantiles(photons * value**gamma, count) / photons) ** (1 / gamma)

    return response_table(counted)


@cache
def gain_table(deviation: float) -> np.ndarray:
    """Return responses that multiply every sample by 1 + N(0, deviation^2)."""
    return response_table(lambda value, count: value * (1 + deviation * normal_quantiles(count)))


def draw_responses(image: np.ndarray, table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Replace every sample of uint8 independently by an outcome of its value in a `response_table`."""

    def respond(strip: np.ndarray) -> np.ndarray:
        positions = strip.astype(np.int64)
        positions *= _OUTCOMES
        draws = random_bytes(rng, 2 * strip.size).view(np.uint16).reshape(strip.shape)
        positions += draws & (_OUTCOMES - 1)
        return np.take(table, positions)

    return in_strips(respond, image)
