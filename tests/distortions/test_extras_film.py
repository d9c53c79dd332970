"""Film and tubes of the extras: every operation does what its name says."""

import math
from itertools import pairwise

import cv2
import numpy as np
import pytest
from conftest import smooth_picture

from featdistill.distortions.extras.film import OPERATIONS
from featdistill.distortions.operation import LEVELS


def apply(name: str, image: np.ndarray, level: int, seed: int = 0) -> np.ndarray:
    return OPERATIONS[name](image, level, np.random.default_rng(seed))


def flat(value: int, side: int = 192) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


@pytest.mark.parametrize("level", LEVELS)
def test_film_grain_is_strongest_in_mid_tones_as_its_density_says(level):
    # Density and deviation of a value v: D = -2.2 log10 v, and v sqrt(D) up to a factor.
    expected = {value: value * math.sqrt(-math.log(value / 255)) for value in (60, 110, 155, 200, 225)}
    scale = OPERATIONS["film_grain"].scales[level - 1]
    for value, deviation in expected.items():
        noise = apply("film_grain", flat(value), level).astype(float) - value
        # Where noise is clipped, its deviation is not the one that was added.
        if value + 3.5 * scale < 255 and value > 3.5 * scale:
            assert noise.std() == pytest.approx(scale * deviation / expected[155], rel=0.06)
            assert abs(noise.mean()) < 0.05 * scale
    assert not apply("film_grain", flat(0), level).any()
    assert apply("film_grain", flat(255), level).min() == 255


def test_film_grain_is_of_luminance_and_wider_than_a_pixel():
    widths = []
    for level in LEVELS:
        noise = apply("film_grain", flat(150, 256), level).astype(float)
        assert np.ptp(noise, axis=2).max() == 0
        noise = noise[..., 0] - noise.mean()
        near, far = (np.mean(noise[:, step:] * noise[:, :-step]) / noise.var() for step in (1, 8))
        widths.append(near)
        assert near > 0.4 and abs(far) < 0.05
    assert all(low < high for low, high in pairwise(widths))


@pytest.mark.parametrize("seed", range(6))
def test_light_leak_is_smooth_warm_light_that_is_brightest_at_an_edge(seed):
    black, image = flat(0, 256), smooth_picture(seed, 256, 256)
    amounts = []
    for level in LEVELS:
        light = apply("light_leak", black, level, seed).astype(int)
        red, green, blue = np.moveaxis(light, 2, 0)
        assert (red >= green).all() and (green >= blue).all() and (red - blue).max() > 40
        edges = (light[0], light[-1], light[:, 0], light[:, -1])
        assert max(edge.max() for edge in edges) == light.max()
        assert light[96:160, 96:160].mean() < 0.5 * light.max()
        assert max(np.abs(np.diff(light, axis=axis)).max() for axis in (0, 1)) <= 12
        amounts.append(light.mean())
        screened = 255 - (255 - image) * (255 - light) / 255
        assert np.abs(apply("light_leak", image, level, seed) - screened).max() <= 1
    assert all(low < high for low, high in pairwise(amounts))


def test_night_vision_sees_luminance_alone_and_shows_it_in_green():
    image = smooth_picture(1, 96, 96)
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    for level in LEVELS:
        seen = apply("night_vision", image, level)
        np.testing.assert_array_equal(seen, apply("night_vision", gray, level))
        red, green, blue = np.moveaxis(seen.astype(int), 2, 0)
        assert (green >= red).all() and (green >= blue).all() and (green > red + 20).mean() > 0.3


@pytest.mark.parametrize("level", LEVELS)
def test_night_vision_counts_photons_and_amplifies_them(level):
    photons, light = OPERATIONS["night_vision"].scales[level - 1], (160 / 255) ** 2.2
    # The middle, where next to nothing is vignetted.
    green = apply("night_vision", flat(160, 400), level)[150:250, 150:250, 1] / 255
    assert np.median(green) ** 2.2 == pytest.approx(1.5 * light, rel=0.1)
    # Counts deviate by their square root; the screen's blur of 0.6 px leaves a part of that.
    taps = cv2.getGaussianKernel(5, 0.6)
    deviation = green.std() / green.mean() / float((taps**2).sum())
    assert deviation == pytest.approx(1 / 2.2 / math.sqrt(photons * light), rel=0.15)


def test_night_vision_is_darker_in_the_corners_and_lifts_dark_pictures():
    losses = []
    for level in LEVELS:
        green = apply("night_vision", flat(200, 256), level)[..., 1].astype(float)
        middle = green[112:144, 112:144].mean()
        corners = [
            green[rows, columns].mean()
            for rows in (slice(8), slice(-8, None))
            for columns in (slice(8), slice(-8, None))
        ]
        assert np.ptp(corners) < 0.2 * middle
        losses.append(1 - np.mean(corners) / middle)
        assert apply("night_vision", flat(30), level)[..., 1].mean() > 45
    assert 0.25 < losses[0] < 0.45 and 0.65 < losses[-1] < 0.8
    assert all(low < high for low, high in pairwise(losses))
