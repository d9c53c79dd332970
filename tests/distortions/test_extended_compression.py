"""Compression of the extended library: every operation does what its name says."""

from itertools import pairwise

import numpy as np
import pytest
from conftest import smooth_picture

from featdistill.distortions.extended.compression import OPERATIONS
from featdistill.distortions.kernels import codecs
from featdistill.distortions.operation import LEVELS


def apply(name: str, image: np.ndarray, level: int) -> np.ndarray:
    return OPERATIONS[name](image, level, np.random.default_rng(0))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


def test_the_category_has_its_five_operations_and_none_is_random():
    assert list(OPERATIONS) == ["jpeg2000", "webp", "gif", "ringing", "color_banding"]
    assert all(operation.category == "compression" for operation in OPERATIONS.values())
    assert not any(operation.random for operation in OPERATIONS.values())


@pytest.mark.parametrize("name", ["jpeg2000", "webp", "gif"])
def test_a_codec_is_its_round_trip_at_the_scale_and_loses_more_with_the_level(name):
    image, qualities = smooth_picture(2, 160, 200), []
    for level in LEVELS:
        result = apply(name, image, level)
        expected = getattr(codecs, name)(image, OPERATIONS[name].scales[level - 1])
        np.testing.assert_array_equal(result, expected)
        qualities.append(psnr(result, image))
    assert all(better > worse for better, worse in pairwise(qualities))
    # Recognisable at the worst; and the mildest does something.
    assert qualities[-1] > 15 and qualities[0] < 45


@pytest.mark.parametrize("level", LEVELS)
def test_gif_has_at_most_its_number_of_colors(level):
    most = OPERATIONS["gif"].scales[level - 1]
    for seed in range(3):
        result = apply("gif", smooth_picture(seed, 120, 120), level)
        assert most / 2 < len(np.unique(result.reshape(-1, 3), axis=0)) <= most


@pytest.mark.parametrize("level", [3, 4, 5])
def test_gif_dithers(level):
    # Without dithering, equal pixels become equal; with it their mean comes nearer to what they were.
    image = np.arange(256, dtype=np.uint8)[None, :, None].repeat(96, axis=0).repeat(3, axis=2)
    columns = apply("gif", image, level)[:, 48:-48].astype(float)
    assert (columns.std(axis=0) > 0).mean() > 0.4
    errors = np.abs(columns - image[:, 48:-48])
    mean_errors = np.abs(columns.mean(axis=0) - image[0, 48:-48])
    assert mean_errors.mean() < 0.5 * errors.mean()


# Ringing

LOW, HIGH, EDGE = 60, 160, 128


def step(level: int, across: bool = True) -> np.ndarray:
    """The response to a step from 60 to 160 before place 128: (256,) float64."""
    image = np.full((48, 256, 3), LOW, np.uint8)
    image[:, EDGE:] = HIGH
    result = apply("ringing", image if across else np.ascontiguousarray(image.transpose(1, 0, 2)), level)
    rows = result if across else result.transpose(1, 0, 2)
    assert np.ptp(rows, axis=0).max() == 0 and np.ptp(rows, axis=2).max() == 0
    return rows[0, :, 0].astype(float)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_a_step_over_and_undershoots_on_both_sides_by_what_gibbs_says(level, across):
    response = step(level, across)
    below, above = LOW - response.min(), response.max() - HIGH
    # 9 % after an ideal low-pass; sampling at so few places a period may catch it a little higher or lower.
    assert 6 <= below <= 12 and 6 <= above <= 12
    assert response[:EDGE].min() == response.min() and response[EDGE:].max() == response.max()


@pytest.mark.parametrize("level", LEVELS)
def test_the_waves_have_the_stated_period(level):
    period_px = OPERATIONS["ringing"].scales[level - 1]
    response = step(level)
    reach = round(period_px)
    for side in (response[EDGE:], LOW + HIGH - response[EDGE - 1 :: -1]):
        # From the edge on: a crest, a trough, and the next crest.
        crest = int(np.argmax(side))
        trough = crest + int(np.argmin(side[crest : crest + reach]))
        next_crest = trough + int(np.argmax(side[trough : trough + reach]))
        assert side[trough] < HIGH - 2 and side[next_crest] > HIGH + 1
        # Of equal values on a crest, the first one is found: up to half a pixel too early.
        assert next_crest - crest == pytest.approx(period_px, abs=1)
        assert crest + 0.5 == pytest.approx(period_px / 2, abs=0.8)


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_faster_than_the_period_goes_and_what_is_slower_stays(level):
    period_px = OPERATIONS["ringing"].scales[level - 1]
    for cycles, kept in ((0.7, 1), (1.4, 0)):
        wave = 128 + 80 * np.sin(2 * np.pi * cycles * np.arange(400) / period_px)
        image = np.rint(wave).astype(np.uint8)[None, :, None].repeat(40, axis=0).repeat(3, axis=2)
        if cycles / period_px > 0.5:  # There is no such wave at this resolution.
            continue
        middle = apply("ringing", image, level)[20, 60:-60, 0]
        assert middle.std() / image[0, 60:-60, 0].std() == pytest.approx(kept, abs=0.25)


@pytest.mark.parametrize("level", LEVELS)
def test_ringing_leaves_flat_areas_alone(level):
    for value in (0, 7, 128, 255):
        image = np.full((33, 47, 3), value, np.uint8)
        np.testing.assert_array_equal(apply("ringing", image, level), image)
    response = step(level)
    reach = int(3 * OPERATIONS["ringing"].scales[level - 1])
    assert (response[: EDGE - reach] == LOW).all() and (response[EDGE + reach :] == HIGH).all()


# Banding


@pytest.mark.parametrize("level", LEVELS)
def test_banding_leaves_its_number_of_values_spread_evenly(level):
    number = OPERATIONS["color_banding"].scales[level - 1]
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(16, axis=0).repeat(3, axis=2)
    result = apply("color_banding", ramp, level)[0].astype(int)
    values = np.unique(result)
    assert len(values) == number and values[0] == 0 and values[-1] == 255
    assert np.ptp(np.diff(values)) <= 1 and (np.diff(result[:, 0]) >= 0).all()
    # Nearest: never farther away than half a band.
    assert np.abs(result[:, 0] - np.arange(256)).max() <= 255 / (number - 1) / 2 + 0.5


def test_banding_does_not_dither():
    image = smooth_picture(5, 90, 90)
    for level in LEVELS:
        result = apply("color_banding", image, level)
        for value in np.unique(image):
            assert len(np.unique(result[image == value])) == 1
