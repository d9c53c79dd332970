"""Color of the extended library: every operation does what its name says."""

from itertools import pairwise

import cv2
import numpy as np
import pytest
from conftest import smooth_picture

from featdistill.distortions.extended import color
from featdistill.distortions.extended.color import OPERATIONS, black_body
from featdistill.distortions.kernels.srgb import from_linear, to_linear
from featdistill.distortions.operation import LEVELS

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def apply(name: str, image: np.ndarray, level: int, seed: int = 0) -> np.ndarray:
    return OPERATIONS[name](image, level, np.random.default_rng(seed))


def linear(values: np.ndarray) -> np.ndarray:
    """Linear light of 8-bit sRGB, written out once more: with a loop over the definition."""
    x = np.asarray(values, float) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def gains(name: str, level: int, seed: int) -> np.ndarray:
    """What the operation multiplies R, G and B of a dark gray by, in linear light."""
    result = apply(name, np.full((16, 16, 3), 100, np.uint8), level, seed)
    assert np.ptp(result.reshape(-1, 3), axis=0).max() == 0
    return linear(result[0, 0]) / linear(100)


def test_the_category_has_its_four_operations():
    assert list(OPERATIONS) == ["color_cast", "white_balance", "chromatic_aberration", "fading"]
    assert all(operation.category == "color" for operation in OPERATIONS.values())


def test_linear_light_and_back_is_the_identity():
    values = np.arange(256) / 255
    np.testing.assert_allclose(to_linear(values), linear(np.arange(256)), rtol=1e-12)
    np.testing.assert_allclose(from_linear(to_linear(values)), values, atol=1e-4)


# Color cast


@pytest.mark.parametrize("level", LEVELS)
def test_a_cast_tints_gray_by_its_share_in_the_drawn_hue(level):
    share, hues = OPERATIONS["color_cast"].scales[level - 1], []
    for seed in range(12):
        tint = gains("color_cast", level, seed)
        # Gains of mean 1 are 1 + share * cos(hue - 0, 120, 240 degrees): one coefficient of a Fourier series.
        tint = tint / tint.mean()
        amount = 2 / 3 * np.sum((tint - 1) * np.exp(2j * np.pi / 3 * np.arange(3)))
        assert abs(amount) == pytest.approx(share, abs=0.02)
        drawn = np.random.default_rng(seed).uniform(0, 2 * np.pi)
        assert abs(np.angle(amount * np.exp(-1j * drawn))) < 0.02 / share
        hues.append(drawn)
    assert np.ptp(hues) > np.pi


def test_a_cast_keeps_the_luminance_of_gray():
    for level in LEVELS:
        for seed in range(8):
            assert LUMINANCE @ gains("color_cast", level, seed) == pytest.approx(1, abs=0.015)


# White balance


def test_black_bodies_have_their_published_chromaticities():
    rgb_to_xyz = np.linalg.inv(color._RGB_OF_XYZ)
    # CIE 1931 x, y of Planckian radiators; 2856 K is illuminant A.
    for kelvin, x, y in ((2000, 0.5267, 0.4133), (2856, 0.4476, 0.4074), (4000, 0.3805, 0.3768)):
        xyz = rgb_to_xyz @ black_body(kelvin)
        np.testing.assert_allclose(xyz[:2] / xyz.sum(), (x, y), atol=6e-4)
        assert xyz[1] == pytest.approx(1, abs=1e-3)


def test_black_bodies_follow_plancks_law():
    """The CIE 1931 observer by the fits of Wyman, Sloan and Shirley (2013), good to about a percent."""
    wavelength_nm = np.arange(360, 831.0)

    def bump(height: float, peak_nm: float, left_nm: float, right_nm: float) -> np.ndarray:
        width_nm = np.where(wavelength_nm < peak_nm, left_nm, right_nm)
        return height * np.exp(-(((wavelength_nm - peak_nm) / width_nm) ** 2) / 2)

    observer = [
        bump(1.056, 599.8, 37.9, 31.0) + bump(0.362, 442.0, 16.0, 26.7) + bump(-0.065, 501.1, 20.4, 26.2),
        bump(0.821, 568.8, 46.9, 40.5) + bump(0.286, 530.9, 16.3, 31.1),
        bump(1.217, 437.0, 11.8, 36.0) + bump(0.681, 459.0, 26.0, 13.8),
    ]
    for kelvin in (*OPERATIONS["white_balance"].scales, 6500):
        radiance = wavelength_nm**-5 / np.expm1(1.4388e7 / (wavelength_nm * kelvin))
        xyz = np.array([(radiance * response).sum() for response in observer])
        np.testing.assert_allclose(black_body(kelvin), color._RGB_OF_XYZ @ (xyz / xyz[1]), atol=0.025)


@pytest.mark.parametrize("level", LEVELS)
def test_white_balance_has_the_gain_ratios_of_the_locus_warm_or_cold(level):
    kelvin, directions = OPERATIONS["white_balance"].scales[level - 1], set()
    for seed in range(10):
        found = gains("white_balance", level, seed)
        is_warm = bool(found[0] > found[2])
        ratio = black_body(kelvin) / black_body(6500)
        expected = ratio if is_warm else 1 / ratio
        assert expected[0] > expected[2] or not is_warm
        np.testing.assert_allclose(found[:2] / found[1], expected[:2] / expected[1], rtol=0.03)
        assert found[2] / found[1] == pytest.approx(expected[2] / expected[1], rel=0.06)
        assert LUMINANCE @ found == pytest.approx(1, abs=0.02)
        directions.add(is_warm)
    assert directions == {True, False}


def test_a_lower_temperature_is_warmer():
    reds = [black_body(kelvin)[0] / black_body(kelvin)[2] for kelvin in OPERATIONS["white_balance"].scales]
    assert reds[0] > 1 and all(less < more for less, more in pairwise(reds))


# Chromatic aberration


def source(level: int, seed: int, channel: int, place: int, axis: int) -> float:
    """Where a channel of what is seen at a place along x (axis 1) or y (0) of 300 x 400 px comes from."""
    size = (300, 400)[axis]
    # Steep enough for an eighth of a pixel, around the place.
    ramp = np.clip(128 + 4 * (np.arange(size) - place), 0, 255).astype(np.uint8)
    plane = ramp[None, :].repeat(300, axis=0) if axis else ramp[:, None].repeat(400, axis=1)
    result = apply("chromatic_aberration", cv2.merge([plane] * 3), level, seed)
    np.testing.assert_array_equal(result[..., 1], plane)
    value = float(result[150, place, channel] if axis else result[place, 200, channel])
    return place + (value - 128) / 4


@pytest.mark.parametrize("level", LEVELS)
def test_aberration_moves_red_and_blue_apart_more_at_the_border_and_green_not_at_all(level):
    share = OPERATIONS["chromatic_aberration"].scales[level - 1]
    for seed in range(3):
        draw = np.random.default_rng(seed)
        share_of_red = share if draw.random() < 0.5 else -share
        optical = np.array([199.5, 149.5]) + draw.uniform(-0.1, 0.1, 2) * (400, 300)
        for axis, middle in ((1, optical[0]), (0, optical[1])):
            apart = []
            for place in (round(middle), round(middle + 50), (300, 400)[axis] - 15):
                red, blue = (source(level, seed, channel, place, axis) for channel in (0, 2))
                assert red == pytest.approx(middle + (place - middle) / (1 + share_of_red), abs=0.2)
                assert blue == pytest.approx(middle + (place - middle) / (1 - share_of_red), abs=0.2)
                apart.append(abs(red - blue))
            assert apart[0] < 0.2 and apart[2] > apart[1] - 0.01 and apart[2] > 0.4


def test_aberration_goes_both_ways_about_different_points():
    axes, signs = set(), set()
    columns = np.arange(200, dtype=np.uint8)[None, :, None].repeat(60, axis=0).repeat(3, axis=2)
    for seed in range(8):
        red = apply("chromatic_aberration", columns, 5, seed)[30, :, 0].astype(int)
        signs.add(int(np.sign(red[170] - 170)))
        axes.add(int(np.argmin(np.abs(red[60:140] - np.arange(60, 140)))))
    assert signs == {-1, 1} and len(axes) > 3


# Fading


def test_fading_lowers_contrast_and_saturation_and_lifts_black_the_more_the_higher_the_level():
    image = smooth_picture(4, 120, 120)
    image[:20, :20] = 0
    contrasts, saturations, blacks, warmths = [], [], [], []
    for faded in [image, *(apply("fading", image, level) for level in LEVELS)]:
        contrasts.append(faded.astype(float).std())
        saturations.append(np.ptp(faded.astype(float), axis=2).mean())
        blacks.append(int(faded[10, 10].min()))
        warmths.append(float(faded[10, 10, 0]) - float(faded[10, 10, 2]))
    for falling in (contrasts, saturations):
        assert all(before > after for before, after in pairwise(falling))
    for rising in (blacks, warmths):
        assert all(before < after for before, after in pairwise(rising))
    assert contrasts[-1] < 0.7 * contrasts[0] and saturations[-1] < 0.7 * saturations[0]


@pytest.mark.parametrize("level", LEVELS)
def test_the_share_of_the_density_that_fading_takes_is_the_stated_one(level):
    share = OPERATIONS["fading"].scales[level - 1]
    grays = np.arange(256, dtype=np.uint8)[None, :, None].repeat(16, axis=0).repeat(3, axis=2)
    faded = apply("fading", grays, level)[0]
    assert (np.diff(faded.astype(int), axis=0) >= 0).all()
    before = -np.log10(0.01 + 0.99 * linear(np.arange(256)))
    after = -np.log10(0.01 + 0.99 * linear(faded))
    # The slope of the densities: what is left of each dye. The stain is an offset.
    slopes = np.array([np.polyfit(before, after[:, channel], 1)[0] for channel in range(3)])
    np.testing.assert_allclose(1 - slopes, share * np.array([1.15, 1, 0.85]), atol=0.015)
    # White paper is yellow: less blue than red.
    assert faded[255, 0] == 255 and faded[255, 2] < faded[255, 1] < 255
