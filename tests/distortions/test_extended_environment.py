"""Environment of the extended library: fog, rain, snow and lens flare follow the physics that they state."""

import math
from itertools import pairwise

import cv2
import numpy as np
import pytest
from conftest import smooth_picture

from featdistill.distortions.extended import environment
from featdistill.distortions.extended.environment import OPERATIONS
from featdistill.distortions.kernels import filters
from featdistill.distortions.operation import LEVELS

SIDE = 256


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def apply(name: str, image: np.ndarray, level: int, seed: int = 0) -> np.ndarray:
    return OPERATIONS[name](image, level, generator(seed))


def flat(value: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def orientation(light: np.ndarray) -> tuple[float, float]:
    """Angle to the vertical along which light (H, W) changes least, and how clear it is (0 to 1).

    From the structure tensor. Above 0 the angle goes down to the right.
    """
    smooth = cv2.GaussianBlur(light.astype(float), (0, 0), 2)
    down, across = np.gradient(smooth)
    tensor = np.array([[(across**2).sum(), (across * down).sum()], [(across * down).sum(), (down**2).sum()]])
    (least, most), axes = np.linalg.eigh(tensor)
    x, y = axes[:, 0]
    return math.atan(x / y), float((most - least) / (most + least))


def test_the_category_has_its_four_operations_and_none_moves_patches():
    assert list(OPERATIONS) == ["fog", "rain", "snow", "lens_flare"]
    assert all(operation.keeps_layout for operation in OPERATIONS.values())


def test_screened_light_saturates_and_never_darkens():
    image, light = smooth_picture(0, 40, 50), smooth_picture(1, 40, 50)
    lit = filters.screen(image, light)
    expected = 255 - (255 - image.astype(float)) * (255 - light.astype(float)) / 255
    assert np.abs(lit - expected).max() <= 0.5 and (lit >= image).all()
    np.testing.assert_array_equal(filters.screen(image, flat(0, 40, 50)), image)
    assert (filters.screen(image, flat(255, 40, 50)) == 255).all()
    gray = np.ascontiguousarray(light[..., 0])
    np.testing.assert_array_equal(filters.screen(image, gray), filters.screen(image, np.dstack([gray] * 3)))


# Fog


@pytest.mark.parametrize("level", LEVELS)
def test_fog_is_koschmieders_law(level):
    image = smooth_picture(2, SIDE, SIDE)
    for seed in range(3):
        black, white = (apply("fog", flat(value), level, seed).astype(float) for value in (0, 255))
        transmission = (white - black) / 255
        # One transmission for all colors, between 0 and 1, and one airlight for all places.
        assert np.ptp(transmission, axis=-1).max() < 0.02
        assert transmission.min() > 0 and transmission.max() < 1
        dense = transmission.mean(axis=-1) < np.quantile(transmission, 0.3)
        airlight = (black[dense] / (1 - transmission[dense])).mean(axis=0)
        assert airlight.min() > 190 and airlight.max() < 250 and np.ptp(airlight) < 14
        expected = image * transmission + airlight * (1 - transmission)
        assert np.abs(apply("fog", image, level, seed) - expected).max() < 3.5


def test_fogs_transmission_is_the_exponential_of_optical_depth():
    depths = []
    for level in LEVELS:
        black, white = (apply("fog", flat(value), level, 3).astype(float) for value in (0, 255))
        seen = ((white - black) / 255).mean(axis=-1)
        depths.append(-np.log(seen) / OPERATIONS["fog"].scales[level - 1])
        # The same scene at every level, within the rounding of its darkest parts.
        assert np.abs(depths[-1] - depths[0]).mean() < 0.02
    rows = depths[2].mean(axis=1)
    assert 0.1 < rows[-10:].mean() < 0.35 and 0.7 < rows[:10].mean() < 1.5


def test_fog_lowers_contrast_raises_a_dark_mean_and_hides_what_is_far():
    image = smooth_picture(4, SIDE, SIDE) // 3
    contrasts, means = [np.diff(image.astype(float), axis=1).std()], [image.mean()]
    for level in LEVELS:
        results = np.array([apply("fog", image, level, seed).astype(float) for seed in range(6)])
        contrasts.append(np.diff(results, axis=2).std())
        means.append(np.mean(results))
        change = np.abs(results - image).mean(axis=(0, 2, 3))
        assert change[:64].mean() > 1.5 * change[-64:].mean()
    assert all(high > low for high, low in pairwise(contrasts))
    assert all(low < high for low, high in pairwise(means))


# Rain


@pytest.mark.parametrize("slant", [-0.3, 0.0, 0.2])
def test_streaks_of_rain_run_along_their_slant_with_a_little_spread(slant):
    for count in (60, 400):
        angle, clear = orientation(environment.rain_streaks(SIDE, SIDE, count, slant, generator(1)))
        assert angle == pytest.approx(slant, abs=0.04) and clear > 0.7
    # They are not all parallel: the angle of each that is long and lies alone, from its second moments.
    angles = []
    for seed in range(20):
        streaks = environment.rain_streaks(320, 320, 20, slant, generator(seed))
        number, labels, found, _ = cv2.connectedComponentsWithStats((streaks > 40).astype(np.uint8))
        for label in range(1, number):
            if found[label, cv2.CC_STAT_HEIGHT] > 25 and found[label, cv2.CC_STAT_WIDTH] < 20:
                y, x = np.nonzero(labels == label)
                spread = np.cov(np.stack([x, y]), aweights=streaks[y, x])
                angles.append(0.5 * math.atan2(2 * spread[0, 1], spread[1, 1] - spread[0, 0]))
    assert len(angles) > 30 and np.mean(angles) == pytest.approx(slant, abs=0.02)
    assert np.std(angles) == pytest.approx(0.03, abs=0.01)


@pytest.mark.parametrize("level", LEVELS)
def test_rain_changes_the_image_along_the_drawn_direction(level):
    image = smooth_picture(5, SIDE, SIDE) // 2
    slants = []
    for seed in range(4):
        change = apply("rain", image, level, seed).astype(float) - image
        angle, clear = orientation(change.mean(axis=-1) - cv2.blur(change.mean(axis=-1), (31, 31)))
        slants.append(environment.rain_slant(generator(seed)))
        assert angle == pytest.approx(slants[-1], abs=0.06) and clear > 0.6
    assert np.ptp(slants) > 0.1 and max(map(abs, slants)) < math.radians(21)


def test_rain_is_sparse_and_grows_denser():
    shares = []
    for level in LEVELS:
        count = OPERATIONS["rain"].scales[level - 1]
        shares.append((environment.rain_streaks(SIDE, SIDE, count, 0.1, generator(2)) > 25).mean())
    assert 0.002 < shares[0] < 0.03 and shares[-1] < 0.3
    assert all(low < high for low, high in pairwise(shares))


def test_streaks_differ_in_length_and_light():
    streaks = environment.rain_streaks(512, 512, 60, 0.0, generator(4))
    _, _, found, _ = cv2.connectedComponentsWithStats((streaks > 20).astype(np.uint8))
    lengths = found[1:, cv2.CC_STAT_HEIGHT]
    assert np.quantile(lengths, 0.9) > 2 * np.quantile(lengths, 0.1)
    assert len(np.unique(streaks)) > 50


def test_between_the_streaks_rain_is_a_veil():
    dark, bright = [], []
    for level in LEVELS:
        # The median is no streak.
        dark.append(np.median(apply("rain", flat(10), level)))
        bright.append(np.median(apply("rain", flat(250), level)))
    assert dark[0] > 10 and bright[0] < 250
    assert all(low < high for low, high in pairwise(dark))
    assert all(low > high for low, high in pairwise(bright))


# Snow


@pytest.mark.parametrize("level", LEVELS)
def test_snow_only_adds_light_in_blobs_without_a_direction(level):
    image = smooth_picture(6, SIDE, SIDE)
    for seed in range(3):
        assert (apply("snow", image, level, seed) >= image).all()
        count = OPERATIONS["snow"].scales[level - 1]
        _, clear = orientation(environment.snow_flakes(SIDE, SIDE, count, generator(seed)))
        # Streaks of rain have more than 0.7.
        assert clear < 0.3


def test_snow_covers_more_and_brightens_more_at_a_higher_level():
    covered, hazes = [], []
    for level in LEVELS:
        result = apply("snow", flat(0), level).min(axis=-1)
        hazes.append(result.min())
        covered.append((result > 60).mean())
    assert 0.002 < covered[0] < 0.03 and 0.1 < covered[-1] < 0.5
    assert all(low < high for low, high in pairwise(covered))
    assert hazes[0] < 5 and all(low < high for low, high in pairwise(hazes)) and hazes[-1] == 45


def test_more_snow_is_the_same_snow_and_more():
    some, more = (environment.snow_flakes(SIDE, SIDE, count, generator(1)) for count in (300, 600))
    assert (more >= some).mean() > 0.998 and (more > some).mean() > 0.02


def test_snow_flakes_are_of_several_sizes_and_the_large_ones_are_soft():
    flakes = environment.snow_flakes(512, 512, 100, generator(2))
    number, labels, found, _ = cv2.connectedComponentsWithStats((flakes > 30).astype(np.uint8))
    areas = found[1:, cv2.CC_STAT_AREA]
    assert areas.max() > 15 * np.median(areas)
    steepest = cv2.morphologyEx(flakes, cv2.MORPH_GRADIENT, np.ones((3, 3)))
    sharpness = np.array([steepest[labels == label].max() for label in range(1, number)])
    assert sharpness[areas.argmax()] < 0.5 * sharpness.max()


def test_snow_flakes_are_a_little_longer_along_their_fall():
    for seed in range(4):
        fall = math.pi / 2 + generator(seed).uniform(-0.6, 0.6)
        angle, clear = orientation(environment.snow_flakes(768, 768, 1500, generator(seed)))
        assert clear > 0.03 and angle == pytest.approx(math.pi / 2 - fall, abs=0.2)


# Lens flare


@pytest.mark.parametrize("size", [(192, 256), (256, 192)])
def test_a_flare_only_adds_light_and_is_brightest_at_its_source(size):
    image = smooth_picture(7, *size) // 2
    for seed in range(4):
        x, y = environment.flare_source(generator(seed))
        assert y < 0 and max(abs(x), abs(y)) < 1 and math.hypot(x, y) >= 0.5
        for level in LEVELS:
            lit = apply("lens_flare", image, level, seed)
            assert (lit >= image).all()
            light = cv2.GaussianBlur(apply("lens_flare", flat(0, *size), level, seed)[..., 1], (0, 0), 4)
            row, column = np.unravel_index(light.argmax(), light.shape)
            expected = [(size[1] - 1) / 2 * (1 + x), (size[0] - 1) / 2 * (1 + y)]
            assert np.hypot(column - expected[0], row - expected[1]) < 8


@pytest.mark.parametrize("source", [(0.5, -0.5), (-0.2, -0.7), (0.7, -0.25)])
def test_ghosts_lie_on_the_line_through_the_source_and_the_middle(source):
    height, width = 300, 400
    y, x = np.indices((height, width))
    from_middle = np.stack([x - (width - 1) / 2, y - (height - 1) / 2], axis=-1)
    direction = np.array([source[0] * width, source[1] * height])
    direction /= np.hypot(*direction)
    along = from_middle @ direction
    aside = from_middle @ np.array([-direction[1], direction[0]])
    spreads = []
    for seed in range(10):
        ghosts = environment.flare_ghosts(height, width, source, 1.0, generator(seed)).astype(float)
        assert ghosts.max() > 30 and not ghosts[np.abs(aside) > 0.15 * height].any()
        # Discs and rings are symmetric about the line; what the frame cuts off may not be.
        inside = ghosts.sum(axis=-1) * (np.abs(along) < 0.3 * height)
        assert abs((inside * aside).sum() / inside.sum()) < 1.5
        weights = ghosts.sum(axis=-1)
        spreads.append(np.sqrt((weights * along**2).sum() / weights.sum()))
    assert np.mean(spreads) > 60


def test_ghosts_are_tinted_each_in_its_own_color():
    ghosts = environment.flare_ghosts(320, 320, (0.6, -0.6), 1.0, generator(3)).astype(float)
    lit = ghosts[ghosts.max(axis=-1) > 15]
    shares = lit / lit.sum(axis=-1, keepdims=True)
    assert shares.std(axis=0).max() > 0.03


def test_the_starburst_has_six_rays():
    for seed in range(4):
        glow = environment.flare_glow(128, 128, (0.0, 0.0), 0.4, generator(seed))[..., 0].astype(np.float32)
        turn = np.linspace(0, 2 * math.pi, 360, endpoint=False)
        ring = [63.5 + 22 * function(turn) for function in (np.cos, np.sin)]
        around = cv2.remap(glow, *(part.astype(np.float32)[None] for part in ring), cv2.INTER_LINEAR)[0]
        spectrum = np.abs(np.fft.rfft(around - around.mean()))
        assert spectrum[6] > 5 * spectrum[1:6].max() and around.max() > 1.5 * np.median(around)


def test_a_stronger_flare_is_a_brighter_one_everywhere():
    for seed in range(3):
        lit = [apply("lens_flare", flat(20), level, seed).astype(int) for level in LEVELS]
        for one, other in pairwise(lit):
            assert (other >= one - 1).all() and other.mean() > one.mean() + 1


def test_ghosts_have_light_in_proportion_to_the_strength():
    faint, strong = (
        environment.flare_ghosts(320, 320, (0.5, -0.6), strength, generator(1)).astype(float)
        for strength in (0.3, 0.9)
    )
    assert strong.max() < 255 and strong.sum() == pytest.approx(3 * faint.sum(), rel=0.05)
