"""Screens of the extras: every operation does what its name says."""

import math

import numpy as np
import pytest

from featdistill.distortions.extras.screen import (
    OPERATIONS,
    display_gains,
    dot_thresholds,
    grid_phases,
    moire_gains,
)
from featdistill.distortions.operation import LEVELS


def apply(name: str, image: np.ndarray, level: int, seed: int = 0) -> np.ndarray:
    return OPERATIONS[name](image, level, np.random.default_rng(seed))


def flat(value: int, side: int = 240) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def strongest_frequency(plane: np.ndarray) -> tuple[float, float]:
    """Return the (across, down) frequency in cycles a px that has the most power, across 0 or more."""
    side = 1024
    power = np.abs(np.fft.rfft2(plane - plane.mean(), (side, side)))
    row, column = np.unravel_index(np.argmax(power), power.shape)
    return column / side, (row - side if row > side // 2 else row) / side


# Halftone


@pytest.mark.parametrize("level", LEVELS)
def test_halftone_keeps_the_mean_of_every_tone(level):
    for value in (0, 10, 64, 128, 190, 245, 255):
        printed = apply("halftone", flat(value), level)
        assert np.abs(printed.mean(axis=(0, 1)) - value).max() <= 5
    assert not apply("halftone", flat(0), level).any()
    assert (apply("halftone", flat(255), level) == 255).all()


@pytest.mark.parametrize("level", LEVELS)
def test_halftone_has_dots_at_its_distance_on_screens_turned_by_channel(level):
    pitch, angles = OPERATIONS["halftone"].scales[level - 1], []
    for channel in range(3):
        across, down = strongest_frequency(apply("halftone", flat(110), level)[..., channel].astype(float))
        assert 1 / math.hypot(across, down) == pytest.approx(pitch, rel=0.08)
        angles.append(math.degrees(math.atan2(down, across)) % 90)
    cyan, magenta, yellow = angles
    assert 10 < cyan < 20 and 70 < magenta < 80 and cyan + magenta == pytest.approx(90, abs=1)
    assert min(yellow, 90 - yellow) < 1


def test_coarse_dots_are_ink_or_paper_and_grow_with_the_tone():
    inked = []
    for value in (220, 170, 120, 60):
        printed = apply("halftone", flat(value), 5)[..., 0].astype(int)
        assert ((printed < 40) | (printed > 215)).mean() > 0.5
        inked.append((printed < 128).mean())
    assert inked == sorted(inked) and inked[0] < 0.2 and inked[-1] > 0.7


def test_thresholds_repeat_without_a_seam_and_are_evenly_spread():
    for right, down in ((3, 1), (1, 4), (6, 2), (8, 0)):
        tile = dot_thresholds(right, down, 3.0).astype(int)
        np.testing.assert_array_equal(np.roll(tile, (down, right), (0, 1)), tile)
        assert tile.mean() == pytest.approx(127.5, abs=1) and tile.min() > 42 and tile.max() < 213
        assert tile.std() == pytest.approx(170 / math.sqrt(12), rel=0.1)


# Moire


def test_a_fine_grid_that_is_sampled_shows_its_beat():
    per_px, bends = (1.021, -0.014), (1.3, -0.8)
    phases = grid_phases(90, 120, per_px, bends)
    x, y = np.arange(120), np.arange(90)[:, None]
    bent = bends[0] * np.linspace(-1, 1, 120) ** 2 + bends[1] * np.linspace(-1, 1, 90)[:, None] ** 2
    expected = per_px[0] * x + per_px[1] * y - bent
    apart = (phases / 256 - expected + 0.5) % 1 - 0.5
    assert np.abs(apart).max() <= 2 / 256
    # From px to px the grid runs through a period and a little more, of which the little is seen.
    steps = (np.diff(phases.astype(int), axis=1) + 128) % 256 - 128
    assert np.abs(steps).max() < 0.1 * 256


@pytest.mark.parametrize("seed", range(5))
def test_moire_is_wide_bands_of_the_contrast_whose_channels_are_a_third_apart(seed):
    contrast = 0.3
    gains = moire_gains(200, 260, contrast, np.random.default_rng(seed)) / 128
    assert gains.mean() == pytest.approx(1, abs=0.05)
    assert 0.8 * contrast < np.abs(gains - 1).max() <= contrast + 0.02
    # What is colored are three waves a third apart: their squares sum up to the same everywhere.
    waves = gains - gains.mean(axis=2, keepdims=True)
    assert np.ptp((waves**2).sum(axis=2)) < 0.1 * (0.7 * contrast) ** 2 * 1.5
    assert (waves**2).sum(axis=2).mean() == pytest.approx(1.5 * (0.7 * contrast) ** 2, rel=0.05)
    across, down = strongest_frequency(waves[..., 0])
    assert 4 < 1 / math.hypot(across, down) < 200
    assert np.abs(np.diff(waves[..., 0], axis=0)).max() < 0.8 * contrast


def test_moire_multiplies_the_image():
    for level in LEVELS:
        gains = moire_gains(240, 240, OPERATIONS["moire"].scales[level - 1], np.random.default_rng(3)) / 128
        for value in (0, 50, 150):
            seen = apply("moire", flat(value), level, 3)
            assert np.abs(seen - np.minimum(255, value * gains)).max() <= 0.51


# Screen capture


@pytest.mark.parametrize("seed", range(4))
def test_a_display_has_stripes_of_three_colors_rows_and_a_backlight(seed):
    gains = display_gains(300, 400, 1.0, np.random.default_rng(seed)) / 128
    stripes = gains - gains.mean(axis=2, keepdims=True)
    across, down = strongest_frequency(stripes[..., 0])
    assert 2.3 < 1 / across < 3.5 and abs(down) < 0.002
    turns = [
        np.angle((stripes[0, :, c] * np.exp(-2j * np.pi * across * np.arange(400))).sum()) for c in range(3)
    ]
    apart = np.diff(turns) / (2 * np.pi) % 1
    assert np.minimum(apart, 1 - apart) == pytest.approx([1 / 3, 1 / 3], abs=0.03)
    across, down = strongest_frequency(gains.mean(axis=2)[:, :1] - gains.mean())
    local = [gains[top : top + 60, left : left + 60].mean() for top in (0, 240) for left in (0, 340)]
    assert 0.95 < max(local) <= 1.02 and 0.69 <= min(local) < 0.85


def test_a_screen_capture_looks_inside_and_moves_patches_with_the_strength():
    side = 200
    moves = []
    for level in LEVELS:
        strength, of_level = OPERATIONS["screen_capture"].scales[level - 1], []
        for seed in range(6):
            dots = flat(0, side)
            for y in (30, 170):
                for x in (30, 170):
                    dots[y - 3 : y + 4, x - 3 : x + 4] = 255
            seen = apply("screen_capture", dots, level, seed).astype(float).mean(axis=2)
            reflected = 255 * 0.12 * strength
            assert np.median(seen) == pytest.approx(reflected, abs=1.5)
            for rows, y in ((np.s_[:100], 30), (np.s_[100:], 170)):
                for columns, x in ((np.s_[:100], 30), (np.s_[100:], 170)):
                    part = np.maximum(seen[rows, columns] - reflected - 20, 0)
                    down, across = np.indices(part.shape)
                    of_level.append((part * down).sum() / part.sum() + (rows.start or 0) - y)
                    of_level.append((part * across).sum() / part.sum() + (columns.start or 0) - x)
            framed = flat(200, side)
            framed[0], framed[-1], framed[:, 0], framed[:, -1] = 0, 0, 0, 0
            assert apply("screen_capture", framed, level, seed)[3:-3, 3:-3].min() > reflected
        moves.append(np.abs(of_level).mean())
        assert np.abs(of_level).max() <= 0.08 * strength * side + 1.5
    assert moves == sorted(moves) and moves[-1] > 3


@pytest.mark.parametrize("level", LEVELS)
def test_a_screen_capture_shows_the_stripes_of_the_display(level):
    strength = OPERATIONS["screen_capture"].scales[level - 1]
    for seed in range(3):
        seen = apply("screen_capture", flat(150, 320), level, seed).astype(float)
        color = seen[..., 0] - seen[..., 1]
        across, down = strongest_frequency(color)
        assert 2.2 < 1 / across < 4 and abs(down) < 0.05
        assert 8 * strength < color.std() < 80 * strength
