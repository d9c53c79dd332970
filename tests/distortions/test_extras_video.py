"""Analogue video of the extras: every operation does what its name says."""

import math

import cv2
import numpy as np
import pytest
from conftest import smooth_picture

from featdistill.distortions.extras.video import OPERATIONS, displaced
from featdistill.distortions.operation import LEVELS


def apply(name: str, image: np.ndarray, level: int, seed: int = 0) -> np.ndarray:
    return OPERATIONS[name](image, level, np.random.default_rng(seed))


@pytest.mark.parametrize("level", LEVELS)
def test_color_bleed_smears_color_to_the_right_and_leaves_luminance(level):
    width, first, behind = 200, 60, 80
    image = np.full((32, width, 3), 120, np.uint8)
    image[:, first:behind] = (170, 100, 90)
    bled = apply("color_bleed", image, level)
    before, after = (cv2.cvtColor(one, cv2.COLOR_RGB2YCrCb).astype(int) for one in (image, bled))
    assert np.abs(after - before)[..., 0].max() <= 2
    reach = round(OPERATIONS["color_bleed"].scales[level - 1] * width)
    tint = after[0, :, 1] - 128
    assert np.abs(tint[:first]).max() <= 1 and np.abs(tint[behind + reach :]).max() <= 1
    assert tint[behind : behind + max(1, reach // 3)].min() >= 2
    assert (np.diff(tint[behind:]) <= 1).all()
    # Color is spread, not lost.
    assert tint.sum() == pytest.approx((before[0, :, 1] - 128).sum(), rel=0.1)


@pytest.mark.parametrize("level", LEVELS)
def test_ghosting_adds_one_displaced_copy_of_its_share(level):
    share, places = OPERATIONS["ghosting"].scales[level - 1], set()
    image = np.zeros((200, 260, 3), np.uint8)
    image[100, 130] = 250
    for seed in range(12):
        ghosted = apply("ghosting", image, level, seed)[..., 0]
        (y_1, x_1), (y_2, x_2) = np.argwhere(ghosted)
        copy = (y_2, x_2) if (y_1, x_1) == (100, 130) else (y_1, x_1)
        assert ghosted[100, 130] == pytest.approx(250 * (1 - share), abs=1)
        assert ghosted[copy] == pytest.approx(250 * share, abs=1)
        assert 0.03 * 200 - 1 <= math.dist(copy, (100, 130)) <= 0.09 * 200 + 1
        places.add(copy)
    assert len(places) > 8
    np.testing.assert_array_equal(apply("ghosting", image[:90], level), image[:90])


def test_a_displaced_image_is_the_image_elsewhere():
    image = smooth_picture(0, 40, 50)
    for across, down in ((3, 0), (-4, 0), (0, 5), (0, -6), (7, -2), (-1, 9)):
        moved = displaced(image, across, down)
        np.testing.assert_array_equal(
            np.roll(image, (down, across), (0, 1))[10:-10, 10:-10], moved[10:-10, 10:-10]
        )
        mirrored = image[:, across] if across > 0 else image[:, across - 1]
        if down == 0:
            np.testing.assert_array_equal(moved[:, 0 if across > 0 else -1], mirrored)


@pytest.mark.parametrize("rows", [64, 240, 720])
def test_scan_lines_take_light_from_rows_at_a_period(rows):
    periods = set()
    image = np.full((rows, 20, 3), 240, np.uint8)
    for level in LEVELS:
        loss = OPERATIONS["scan_lines"].scales[level - 1]
        for seed in range(12):
            lines = apply("scan_lines", image, level, seed)
            assert np.ptp(lines, axis=(1, 2)).max() == 0
            column = lines[:, 0, 0]
            period = next(p for p in range(1, 40) if (column[p:] == column[:-p]).all())
            periods.add(period // max(1, rows // 240))
            assert column.max() == 240
            # Sampled at the middle of the gap only where the period is even.
            deepest = 0.5 - 0.5 * math.cos(2 * math.pi * (period // 2) / period)
            light = (column.min() / 240) ** 2.2
            assert light == pytest.approx(1 - loss * deepest, abs=0.015)
    assert periods == {2, 3, 4}
