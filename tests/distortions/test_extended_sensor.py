"""Sensor and lens of the extended library: every operation does what its name says."""

from itertools import pairwise

import numpy as np
import pytest
from conftest import smooth_picture

from featdistill.distortions.extended.sensor import OPERATIONS, spilt_charge
from featdistill.distortions.operation import LEVELS


def apply(name: str, image: np.ndarray, level: int, seed: int = 0) -> np.ndarray:
    return OPERATIONS[name](image, level, np.random.default_rng(seed))


def highlight(value: int = 255, ground: int = 30) -> np.ndarray:
    """A square of 40 x 40 px in the middle of a dark image of 320 x 400 px."""
    image = np.full((320, 400, 3), ground, np.uint8)
    image[140:180, 180:220] = value
    return image


def test_the_category_has_its_two_operations():
    assert list(OPERATIONS) == ["blooming", "vignetting"]
    assert all(operation.category == "sensor" for operation in OPERATIONS.values())


# Blooming


@pytest.mark.parametrize("value", [255, 200])
@pytest.mark.parametrize("level", LEVELS)
def test_charge_overflows_along_columns_only(level, value):
    image = highlight(value)
    change = apply("blooming", image, level)[..., 1].astype(int) - 30
    # Farther from the highlight than the glow, 5 sigma of 4 % of the height, only its columns are lighter.
    away = 64
    assert (change[: 140 - away, 180:220].max(axis=0) > 0).all() or level == 1
    assert not change[:, : 180 - away].any() and not change[:, 220 + away :].any()
    column, row = change[:, 200], change[160]
    assert column[140 - 30] > 2 * row[180 - 30] and column[180 + 30] > 2 * row[220 + 30]


@pytest.mark.parametrize("level", LEVELS)
def test_the_overflow_decays_exponentially_and_is_as_much_as_the_excess(level):
    bloomed = apply("blooming", highlight(ground=0), level)[:, 200, 1].astype(float)
    light = (bloomed / 255) ** 2
    length_px, excess = 0.08 * 320, OPERATIONS["blooming"].scales[level - 1]
    # A row of the overflow integrates over the highlight's 40 rows; the glow has ended at 64 px.
    for distance in (66, 80, 100):
        expected = 0.85 * excess / 2 * np.exp(-distance / length_px) * (1 - np.exp(-40 / length_px))
        assert light[139 - distance] == pytest.approx(expected, rel=0.2, abs=0.0015)
        assert light[180 + distance] == pytest.approx(expected, rel=0.2, abs=0.0015)


def test_spilt_charge_keeps_the_excess():
    saturated = np.zeros((320, 400), np.uint8)
    saturated[150:170, 190:203] = 255
    spilt = spilt_charge(saturated)
    rows_px = 320 / len(spilt)
    assert spilt.sum() * rows_px == pytest.approx(20 * 13, rel=0.02)
    # In the highlight's columns there is the overflow and some glow, next to them the glow alone.
    assert spilt[:, 190:203].sum() * rows_px == pytest.approx(0.85 * 260 + 0.15 * 260 * 0.4, rel=0.08)
    assert (spilt[:, 150] > 0).any() and not (spilt[:, 20] > 1e-6).any()


def test_blooming_never_darkens_and_has_the_highlights_color():
    for seed in range(4):
        image = smooth_picture(seed, 150, 130)
        dim = image // 2
        for level in LEVELS:
            for one in (image, dim):
                assert (apply("blooming", one, level) >= one).all()
    # What counts as saturated without being white spills light of its own color, and never more than it has.
    image = highlight(ground=10)
    image[140:180, 180:220] = (200, 150, 90)
    bloomed = apply("blooming", image, 5)
    assert (bloomed.reshape(-1, 3).max(axis=0) == (200, 150, 90)).all()
    np.testing.assert_allclose(bloomed[130, 200], (200, 150, 90), atol=1)


def test_images_without_saturated_pixels_bloom_and_flat_ones_stay():
    for value in (0, 7, 255):
        flat = np.full((40, 40, 3), value, np.uint8)
        for level in LEVELS:
            np.testing.assert_array_equal(apply("blooming", flat, level), flat)
    for seed in range(6):
        image = smooth_picture(seed, 64, 64) // 3
        results = [apply("blooming", image, level).astype(int) for level in LEVELS]
        assert (results[0] > image).any()
        assert all((less <= more).all() and (less < more).any() for less, more in pairwise(results))


# Vignetting


def light_left(level: int, seed: int, height: int = 300, width: int = 400) -> np.ndarray:
    """The share of light that each pixel of a gray image keeps (gamma 2.2)."""
    result = apply("vignetting", np.full((height, width, 3), 240, np.uint8), level, seed)
    assert np.ptp(result, axis=2).max() == 0
    return (result[..., 0] / 240) ** 2.2


def distances(seed: int, height: int = 300, width: int = 400) -> np.ndarray:
    """How far each pixel is from the drawn axis."""
    down, across = np.random.default_rng(seed).uniform(-0.1, 0.1, 2)
    y, x = np.indices((height, width))
    return np.hypot(y - (height - 1) / 2 - down * height, x - (width - 1) / 2 - across * width)


@pytest.mark.parametrize("level", LEVELS)
def test_light_falls_with_cos_4_to_the_stated_loss_in_the_farthest_corner(level):
    loss = OPERATIONS["vignetting"].scales[level - 1]
    for seed in range(3):
        left, distance = light_left(level, seed), distances(seed)
        corner = np.unravel_index(np.argmax(distance), distance.shape)
        assert set(corner) <= {0, 299, 399}
        assert left[corner] == pytest.approx(1 - loss, abs=0.012)
        # cos^4 of an angle whose tangent grows in proportion to the distance.
        tangent = np.sqrt((1 - loss) ** -0.5 - 1) * distance / distance.max()
        np.testing.assert_allclose(left, np.cos(np.arctan(tangent)) ** 4, atol=0.012)


@pytest.mark.parametrize("level", LEVELS)
def test_light_falls_monotonously_and_the_middle_keeps_all(level):
    for seed in range(3):
        left, distance = light_left(level, seed).ravel(), distances(seed).ravel()
        assert (left[distance < 4] == 1).all() and left.max() == 1
        rings = [
            left[(distance >= inner) & (distance < inner + 20)].mean()
            for inner in range(0, int(distance.max()), 20)
        ]
        assert all(more > less for more, less in pairwise(rings))


@pytest.mark.parametrize("size", [(16, 16), (17, 233), (90, 61)])
def test_vignetting_of_small_and_narrow_images_follows_the_same_law(size):
    for level in (1, 5):
        loss = OPERATIONS["vignetting"].scales[level - 1]
        left, distance = light_left(level, 3, *size), distances(3, *size)
        expected = (1 + ((1 - loss) ** -0.5 - 1) * (distance / distance.max()) ** 2) ** -2.0
        np.testing.assert_allclose(left, expected, atol=0.05)


def test_the_axis_is_drawn():
    axes = {int(np.argmax(light_left(5, seed))) for seed in range(6)}
    assert len(axes) == 6
