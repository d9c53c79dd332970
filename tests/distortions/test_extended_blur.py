"""Blur of the extended library: every operation does what its name says."""

import math

import cv2
import numpy as np
import pytest
from conftest import smooth_picture

from featdistill.distortions.extended import blur
from featdistill.distortions.operation import LEVELS


def apply(name: str, image: np.ndarray, level: int, seed: int = 0) -> np.ndarray:
    return blur.OPERATIONS[name](image, level, np.random.default_rng(seed))


def spread(values: np.ndarray) -> np.ndarray:
    """The covariance, in px^2, of where an image is bright: x first, then y."""
    y, x = np.nonzero(values)
    return np.cov(np.stack([x, y]), aweights=values[y, x].astype(float), ddof=0)


# Motion


@pytest.mark.parametrize("level", LEVELS)
def test_motion_smears_a_point_to_the_stated_length_along_the_drawn_angle(level):
    length_px = blur.OPERATIONS["motion_blur"].scales[level - 1]
    image = np.zeros((65, 65, 3), np.uint8)
    image[32, 32] = 255
    for seed in range(8):
        angle = np.random.default_rng(seed).uniform(0, math.pi)
        covariance = spread(apply("motion_blur", image, level, seed)[..., 0])
        along = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-math.sin(angle), math.cos(angle)])
        # An even stroke has the variance length^2 / 12; splitting points among pixels adds at most 1/4.
        assert along @ covariance @ along == pytest.approx(length_px**2 / 12, rel=0.08, abs=0.4)
        assert across @ covariance @ across < 0.4


# Defocus


@pytest.mark.parametrize("blades", [0, 5, 6, 7, 8])
@pytest.mark.parametrize("radius_px", [1.0, 2.7, 4.0, 5.5, 9.0])
def test_an_aperture_is_flat_inside_and_has_the_root_mean_square_radius_of_the_disc(radius_px, blades):
    kernel = blur.aperture_kernel(radius_px, blades, 0.3)
    y, x = np.indices(kernel.shape) - len(kernel) // 2
    distance = np.hypot(x, y)
    assert kernel.min() >= 0 and kernel.sum() == pytest.approx(1)
    # The width of a pixel itself adds 1/6, and nearly twice that where the disc is hardly wider than it.
    assert (kernel * distance**2).sum() == pytest.approx(radius_px**2 / 2 + 1 / 6, rel=0.02, abs=0.15)
    half_diagonal = 0.5**0.5
    inner = kernel[distance <= 0.9 * radius_px - half_diagonal]
    assert np.ptp(inner) < 1e-12
    assert not kernel[distance > 1.15 * radius_px + half_diagonal].any()
    if not blades:
        assert not kernel[distance > radius_px + half_diagonal].any()
        assert kernel.max() == pytest.approx(1 / (math.pi * radius_px**2), rel=0.05)


def test_a_polygonal_aperture_has_as_many_sides_as_blades():
    for blades in (5, 6, 7, 8):
        kernel = blur.aperture_kernel(30.0, blades, 0.2)
        y, x = np.indices(kernel.shape) - len(kernel) // 2
        turns = [
            (kernel * np.exp(1j * n * np.arctan2(y, x)) * np.hypot(x, y) ** 2).sum() for n in range(3, 9)
        ]
        assert 3 + int(np.argmax(np.abs(turns))) == blades


def test_defocus_is_the_mean_over_one_of_the_apertures():
    image = smooth_picture(1, 70, 90)
    image[30:40, 40:50] = 255
    for level in LEVELS:
        radius_px, shapes = blur.OPERATIONS["defocus_blur"].scales[level - 1], set()
        for seed in range(6):
            blurred, errors = apply("defocus_blur", image, level, seed), {}
            for blades in (0, 5, 6, 7, 8):
                for turn in range(12 if blades else 1):
                    kernel = blur.aperture_kernel(
                        radius_px, blades, 2 * math.pi * turn / (12 * (blades or 1))
                    )
                    exact = cv2.filter2D(image.astype(float), -1, kernel, borderType=cv2.BORDER_REPLICATE)
                    errors[blades, turn] = np.abs(blurred - exact).max()
            best = min(errors, key=errors.get)
            assert errors[best] < 0.51
            shapes.add(best)
        assert len(shapes) > 3


# Turbulent air


@pytest.mark.parametrize("level", LEVELS)
def test_air_moves_points_by_the_stated_rms_and_neighbors_alike(level):
    rms_px = blur.OPERATIONS["atmospheric_blur"].scales[level - 1]
    side, slope = 120, 2
    ramps = np.zeros((side, side, 3), np.uint8)
    ramps[..., 0], ramps[..., 1] = slope * np.arange(side), slope * np.arange(side)[:, None]
    inner, moves, jumps = slice(12, -12), [], []
    for seed in range(12):
        # On a ramp a value tells where the light came from; a blur leaves it as it is.
        seen = apply("atmospheric_blur", ramps, level, seed)[inner, inner, :2].astype(float)
        move = (seen - ramps[inner, inner, :2]) / slope
        moves.append(move)
        jumps.append(np.diff(move, axis=0))
    for axis in (0, 1):
        assert np.std([move[..., axis] for move in moves]) == pytest.approx(rms_px, rel=0.15)
    # Rounding to steps of 1 / slope px gives a difference of at most 0.2 px RMS by itself.
    assert np.sqrt(np.mean(np.square(jumps))) < 0.2 + 0.12 * rms_px
    assert np.abs(np.mean(moves)) < 0.3 * rms_px


def test_the_displacements_of_the_air_are_smooth_and_of_one_strength_everywhere():
    rng = np.random.default_rng(3)
    places = blur.turbulent_sources(400, 600, 2.0, rng).copy()
    y, x = np.indices((400, 600))
    moves = places - np.dstack([x, y])
    assert moves.std() == pytest.approx(2.0, rel=0.07)
    assert moves[:40].std() == pytest.approx(moves[180:220].std(), rel=0.35)
    for axis in (0, 1):
        assert np.abs(np.diff(moves, axis=axis)).max() < 1
    far = np.mean(moves[:, 50:] * moves[:, :-50]) / moves.var()
    near = np.mean(moves[:, 8:] * moves[:, :-8]) / moves.var()
    assert near > 0.7 and abs(far) < 0.2


@pytest.mark.parametrize("level", LEVELS)
def test_air_blurs_an_edge_by_as_much_as_it_moves_it(level):
    sigma_px = blur.OPERATIONS["atmospheric_blur"].scales[level - 1]
    image = np.zeros((96, 96, 3), np.uint8)
    image[:, 48:] = 240
    seen = apply("atmospheric_blur", image, level)[..., 0].astype(float)
    widths = []
    for row in np.diff(seen, axis=1):
        places = np.arange(len(row)) - (row * np.arange(len(row))).sum() / row.sum()
        widths.append((row * places**2).sum() / row.sum())
    # Interpolation between pixels and the step between them blur by about 1/4 px^2 themselves.
    assert np.mean(widths) == pytest.approx(sigma_px**2 + 0.2, rel=0.2, abs=0.15)


# Glass


def test_glass_only_exchanges_pixels_nearby_and_alike_in_all_directions(monkeypatch):
    monkeypatch.setattr(blur, "gaussian_blur", lambda image, sigma_px: image)
    height, width = 200, 240
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.indices((height, width))
    for level in LEVELS:
        reach_px, moments = blur.OPERATIONS["glass_blur"].scales[level - 1], []
        for seed in range(12):
            moved = apply("glass_blur", image, level, seed)
            places = moved[..., 0].astype(int) * width + moved[..., 1]
            np.testing.assert_array_equal(np.sort(places.ravel()), np.arange(height * width))
            move = (moved.astype(int) - image)[..., :2]
            assert np.abs(move).max() <= 2 * reach_px
            assert 0.5 < move.any(axis=2).mean() < 0.9
            # Scattered, not shifted: a patch keeps its place.
            assert np.abs(move.mean(axis=(0, 1))).max() < 0.05 * reach_px
            moments.append((move.astype(float) ** 2).mean(axis=(0, 1)))
        down, across = np.mean(moments, axis=0)
        assert down == pytest.approx(across, rel=0.35)
        assert 0.5 * reach_px**2 < down + across < 1.5 * reach_px**2


def test_glass_blurs_before_and_after(monkeypatch):
    sigmas = []

    def noted(image: np.ndarray, sigma_px: float) -> np.ndarray:
        sigmas.append(sigma_px)
        return cv2.GaussianBlur(image, (0, 0), sigma_px)

    monkeypatch.setattr(blur, "gaussian_blur", noted)
    apply("glass_blur", smooth_picture(0), 5)
    assert sigmas == [1.0, 1.0]


# Zoom


@pytest.mark.parametrize("level", LEVELS)
def test_a_zoom_stroke_grows_with_the_distance_from_the_center_and_points_at_it(level):
    amount = blur.OPERATIONS["zoom_blur"].scales[level - 1]
    for distance_px in (40, 80, 110):
        image = np.zeros((257, 321, 3), np.uint8)
        image[127:130, 160 + distance_px - 1 : 160 + distance_px + 2] = 255
        before, after = spread(image[..., 0]), apply("zoom_blur", image, level)[..., 0]
        covariance = spread(after)
        stroke_px = amount * distance_px
        # An even stroke has the variance length^2 / 12; one of four exposures 5 / 3 of that, one of eight
        # 9 / 7, and interpolation adds a little.
        grown = covariance[0, 0] - before[0, 0]
        assert 0.95 * stroke_px**2 / 12 - 0.05 < grown < 5 / 3 * stroke_px**2 / 12 + 0.4
        assert covariance[1, 1] - before[1, 1] < 0.35
        outwards = np.average(np.arange(321), weights=after.sum(axis=0)) - 160 - distance_px
        assert outwards == pytest.approx(stroke_px / 2, rel=0.05, abs=0.1)


def test_a_zoom_leaves_the_center_sharp_and_looks_inwards_only():
    image = np.random.default_rng(0).integers(40, 216, (201, 201, 3), dtype=np.uint8)
    image[:3], image[-3:], image[:, :3], image[:, -3:] = 0, 0, 0, 0
    for level in LEVELS:
        blurred = apply("zoom_blur", image, level)
        change = np.abs(blurred.astype(int) - image)
        assert change[99:102, 99:102].max() <= 16
        assert change[99:102, 99:102].mean() < 0.2 * change[20:40, 20:40].mean()
        # Exposures from beyond the image would make the frame thicker.
        assert blurred[4:-4, 4:-4].min() >= 35


def test_both_ways_to_magnify_agree_with_the_definition():
    image = cv2.cvtColor(cv2.GaussianBlur(smooth_picture(5, 220, 301), (0, 0), 2), cv2.COLOR_RGB2RGBA)
    y, x = np.indices((220, 301), dtype=np.float32)
    # Whole margins on both sides at 1 / (1 - 2 * 22 / 220); none of them reaches the least one at 1.03.
    for factor in (1.03, 1.25):
        magnified = np.empty_like(image)
        blur.magnify(image, factor, magnified)
        places = (150 + (x - 150) / factor, 109.5 + (y - 109.5) / factor)
        exact = cv2.remap(image.astype(np.float32), *places, cv2.INTER_LINEAR)
        assert np.abs(magnified - exact).max() < 4 and np.abs(magnified - exact).mean() < 0.5
