"""Noise of the extended library: every operation does what its name says."""

from itertools import pairwise

import numpy as np
import pytest

from featdistill.distortions.extended import noise
from featdistill.distortions.kernels.srgb import from_linear, to_linear
from featdistill.distortions.operation import LEVELS

BAYER = np.array([[0, 1], [1, 2]])


def apply(name: str, image: np.ndarray, level: int, seed: int = 0) -> np.ndarray:
    return noise.OPERATIONS[name](image, level, np.random.default_rng(seed))


def scale(name: str, level: int) -> float:
    return noise.OPERATIONS[name].scales[level - 1]


def flat(value: int | tuple[int, int, int], side: int = 256) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def noise_on(name: str, value: int, level: int, side: int = 256) -> np.ndarray:
    """What is added to a flat image, (side, side, 3) float."""
    return apply(name, flat(value, side), level).astype(float) - value


def shared(one: np.ndarray, other: np.ndarray) -> float:
    """The correlation of two fields."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def skewness(values: np.ndarray) -> float:
    return float(np.mean((values - values.mean()) ** 3) / values.std() ** 3)


# Light


@pytest.mark.parametrize("level", LEVELS)
def test_poisson_noise_has_a_variance_that_grows_linearly_with_the_value(level):
    photons = scale("poisson_noise", level)
    for value in (30, 60, 120):
        added = noise_on("poisson_noise", value, level)
        # The count has mean and variance photons * value / 255; rounding adds 1/12.
        assert added.var() == pytest.approx(255 * value / photons + 1 / 12, rel=0.04)
        assert abs(added.mean()) < 0.03 * value**0.5
    assert not noise_on("poisson_noise", 0, level).any()


def test_poisson_noise_of_few_photons_is_of_whole_counts():
    seen = np.unique(apply("poisson_noise", flat(60), 5))
    photons = scale("poisson_noise", 5)
    assert set(seen) <= {round(255 * count / photons) for count in range(int(photons) + 1)}


@pytest.mark.parametrize("level", LEVELS)
def test_speckle_has_a_deviation_in_proportion_to_the_value_and_the_skewness_of_a_gamma_law(level):
    looks = scale("speckle_noise", level)
    for value in (30, 60, 90):
        added = noise_on("speckle_noise", value, level)
        assert added.std() == pytest.approx(value / looks**0.5, rel=0.02)
        assert abs(added.mean()) < 0.02 * value
        assert skewness(added) == pytest.approx(2 / looks**0.5, rel=0.15, abs=0.03)
    assert abs(shared(added[..., 0], added[..., 1])) < 0.02
    assert abs(shared(added[1:], added[:-1])) < 0.02


@pytest.mark.parametrize("level", LEVELS)
def test_multiplicative_noise_is_one_gaussian_factor_for_all_channels_in_a_mottle(level):
    gain = scale("multiplicative_noise", level)
    seen = apply("multiplicative_noise", flat((120, 80, 40), 512), level).astype(float)
    factors = seen / (120, 80, 40)
    for channel, value in enumerate((120, 80, 40)):
        assert factors[..., channel].std() == pytest.approx(gain, rel=0.08)
        assert np.abs(seen[..., channel] - factors[..., 0] * value).max() <= 1
    assert abs(skewness(factors[..., 0])) < 0.1 and factors.mean() == pytest.approx(1, abs=0.01)
    field = factors[..., 0]
    # Smoothing white noise with a Gaussian of 1.2 px leaves a correlation of exp(-distance^2 / 5.76).
    for distance in (1, 2, 3):
        expected = np.exp(-(distance**2) / (4 * 1.2**2))
        assert shared(field[distance:], field[:-distance]) == pytest.approx(expected, abs=0.06)
        assert shared(field[:, distance:], field[:, :-distance]) == pytest.approx(expected, abs=0.06)
    assert abs(shared(field[8:], field[:-8])) < 0.03


def test_noise_is_as_strong_at_the_edges_as_inside():
    for name in ("multiplicative_noise", "iso_noise"):
        added = noise_on(name, 100, 5, 700)
        edges = np.concatenate([added[:2].ravel(), added[-2:].ravel(), added[:, 0].ravel()])
        assert edges.std() == pytest.approx(added[100:-100, 100:-100].std(), rel=0.08)


# Sensors


@pytest.mark.parametrize("level", LEVELS)
def test_shot_noise_has_a_linear_variance_of_photons_and_read_noise_in_linear_light(level):
    photons, read = scale("shot_noise", level), 1.5
    for value in (60, 110, 160):
        if value == 60 and level > 3:
            continue  # Darker than that, the noise is cut off at black.
        light = to_linear(apply("shot_noise", flat(value, 512), level) / 255)
        mean = float(to_linear(np.array(value / 255)))
        assert light.mean() == pytest.approx(mean, rel=0.01)
        assert light.var() == pytest.approx(mean / photons + (read / photons) ** 2, rel=0.03)


def test_shot_noise_reads_noise_even_where_there_is_no_light():
    photons = scale("shot_noise", 3)
    light = to_linear(apply("shot_noise", flat(0, 512), 3) / 255)
    # Half of a normal distribution is cut off; the square of the rest is half of its variance.
    assert np.mean(light**2) == pytest.approx((1.5 / photons) ** 2 / 2, rel=0.05)
    assert np.mean(light > 0) == pytest.approx(0.5, abs=0.06)


def test_the_srgb_curves_are_those_of_the_standard():
    values = np.arange(256) / 255
    light = to_linear(values)
    np.testing.assert_allclose(from_linear(light), values, atol=1e-6)
    # Reference points of IEC 61966-2-1: its junction, and middle gray of 18 %.
    assert to_linear(np.array([0.04045]))[0] == pytest.approx(0.0031308, rel=1e-3)
    assert from_linear(np.array([0.18]))[0] == pytest.approx(0.4614, abs=1e-3)


@pytest.mark.parametrize("level", LEVELS)
def test_a_fixed_pattern_is_of_columns_and_of_photosites(level):
    steps = scale("fixed_pattern_noise", level)
    # In black no photosite has anything to amplify: what is left are the columns, equal all the way down.
    dark = apply("fixed_pattern_noise", flat(0), level)
    assert not np.ptp(dark, axis=0).any() and dark.any() and not np.ptp(dark, axis=2).any()

    value = 128
    added = noise_on("fixed_pattern_noise", value, level, 600)
    columns = added.mean(axis=(0, 2))
    assert columns.std() == pytest.approx(steps, rel=0.15)
    halves = added[:300].mean(axis=(0, 2)), added[300:].mean(axis=(0, 2))
    assert shared(*halves) > 0.99
    sites = added - columns[:, None]
    assert sites.std() == pytest.approx(np.hypot(value * steps / 255, 12**-0.5), rel=0.05)
    assert abs(shared(sites[..., 0], sites[..., 1])) < 0.02
    rows = added.mean(axis=(1, 2))
    assert rows.std() < 0.1 * steps


@pytest.mark.parametrize("level", LEVELS)
def test_dead_pixels_are_extreme_and_as_many_as_stated(level):
    side = 512
    seen = apply("dead_pixels", flat(100, side), level)
    dead, hot = seen == 0, seen == 255
    share = (dead | hot).sum() / side**2
    assert share == pytest.approx(scale("dead_pixels", level), rel=0.02, abs=2 / side**2)
    assert hot.sum() == pytest.approx(dead.sum(), rel=0.4)
    # A photosite measures the color of its place in the mosaic of the sensor.
    y, x, channel = np.nonzero(dead | hot)
    # Two that overlap can drive a neighbor to the extreme, too.
    assert (channel == BAYER[y % 2, x % 2]).mean() > 0.98
    assert np.bincount(channel) / len(channel) == pytest.approx([0.25, 0.5, 0.25], abs=0.13)
    # Most of the image is as it was.
    assert (seen == 100).mean() > 1 - 4 * share


def test_a_single_dead_pixel_spreads_as_bilinear_demosaicing_spreads_it():
    found = set()
    for seed in range(100):
        image = flat(100, 32)
        # At this size the mildest level has a single one.
        change = apply("dead_pixels", image, 1, seed).astype(int) - 100
        assert np.count_nonzero(change.any(axis=(0, 1))) == 1
        y, x, channel = np.unravel_index(np.abs(change).argmax(), change.shape)
        if min(y, x) == 0 or max(y, x) == 31:
            continue
        most = change[y, x, channel]
        assert most in (-100, 155)
        shares = [[0, 1, 0], [1, 4, 1], [0, 1, 0]] if channel == 1 else [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
        around = change[y - 1 : y + 2, x - 1 : x + 2, channel]
        np.testing.assert_allclose(around, most * np.array(shares) / 4, atol=0.5)
        assert np.count_nonzero(change) == np.count_nonzero(shares)
        found.add((int(channel), int(most)))
    assert len(found) == 6


@pytest.mark.parametrize("level", LEVELS)
def test_iso_noise_is_fine_in_luma_and_blotchy_in_chroma(level):
    added = noise_on("iso_noise", 128, level, 512)
    luma = added @ (0.299, 0.587, 0.114)
    # As JPEG defines them: what is left of red and blue beyond luma, scaled.
    chroma = [0.713 * (added[..., 0] - luma), 0.564 * (added[..., 2] - luma)]
    steps = scale("iso_noise", level)
    assert luma.std() == pytest.approx(steps, rel=0.06)
    for plane in chroma:
        assert plane.std() == pytest.approx(0.5 * steps, rel=0.1, abs=0.15)
        assert abs(shared(plane, luma)) < 0.06
    assert abs(shared(*chroma)) < 0.06
    # White noise smoothed with Gaussians of 0.7 and of 2 px; rounding makes the weakest noise whiter.
    tolerance = 0.05 + 0.2 / steps
    for distance, in_luma, in_chroma in ((1, 0.60, 0.94), (2, 0.13, 0.78), (4, 0.0, 0.37), (9, 0.0, 0.01)):
        assert shared(luma[distance:], luma[:-distance]) == pytest.approx(in_luma, abs=tolerance)
        for plane in chroma:
            assert shared(plane[:, distance:], plane[:, :-distance]) == pytest.approx(
                in_chroma, abs=tolerance + 0.15 / steps
            )


@pytest.mark.parametrize("level", LEVELS)
def test_iso_noise_is_stronger_in_the_shadows(level):
    deviations = [noise_on("iso_noise", value, level).std() for value in (45, 80, 128, 190)]
    assert all(dark > 1.05 * light for dark, light in pairwise(deviations))
    assert 1.2 < deviations[0] / deviations[2] < 2.1


def test_iso_noise_about_doubles_in_deep_shadows():
    assert 1.6 < noise_on("iso_noise", 13, 1).std() / noise_on("iso_noise", 128, 1).std() < 2.2
