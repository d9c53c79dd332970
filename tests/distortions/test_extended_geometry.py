"""Geometry of the extended library: every map is the one that its name says, and the image follows it."""

import math
from itertools import pairwise

import cv2
import numpy as np
import pytest
from conftest import smooth_picture

from featdistill.distortions.extended import geometry
from featdistill.distortions.extended.geometry import OPERATIONS
from featdistill.distortions.kernels import warps
from featdistill.distortions.operation import LEVELS

SIDE = 240
MIDDLE = (SIDE - 1) / 2


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scale(name: str, level: int) -> float:
    return OPERATIONS[name].scales[level - 1]


def places(name: str, level: int, seed: int = 0) -> np.ndarray:
    """Where in a 240 x 240 image the pixels of the result come from: (H, W, 2) x and y, to half a px."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[..., 1], image[..., 0] = np.indices((SIDE, SIDE))
    return OPERATIONS[name](image, level, generator(seed))[..., :2].astype(float)


def linear_map(name: str, level: int, seed: int) -> np.ndarray:
    """The (2, 2) matrix by which an operation maps (from the middle), fitted to the middle of its result."""
    reach = SIDE // 5
    inner = slice(SIDE // 2 - reach, SIDE // 2 + reach)
    y, x = np.indices((SIDE, SIDE))[:, inner, inner].reshape(2, -1) - MIDDLE
    found = places(name, level, seed)[inner, inner].reshape(-1, 2) - MIDDLE
    design = np.stack([x, y, np.ones_like(x)], axis=1)
    fitted, *_ = np.linalg.lstsq(design, found, rcond=None)
    # Straight lines stay straight, parallels stay parallel, and the middle stays where it is.
    assert np.abs(design @ fitted - found).max() < 1.1
    assert np.abs(fitted[2]).max() < 0.1
    return np.linalg.inv(fitted[:2].T)


def test_the_category_has_its_six_operations_and_all_move_patches():
    assert list(OPERATIONS) == [
        "elastic",
        "perspective_warp",
        "barrel",
        "pincushion",
        "rotate_scale",
        "shear",
    ]
    assert not any(operation.keeps_layout for operation in OPERATIONS.values())


# Sampling


def test_maps_that_leave_all_in_place_leave_the_image():
    image = smooth_picture(0, 61, 90)
    here = np.stack(np.meshgrid(np.arange(90), np.arange(61)), axis=-1).astype(np.float32)
    still = [
        here + geometry.elastic_displacement(61, 90, 0.0, generator()),
        geometry.radial_sources(61, 90, 0.0),
    ]
    for sources in still:
        np.testing.assert_allclose(sources, here, atol=1e-4)
        np.testing.assert_array_equal(warps.resample(image, here), image)
    matrices = [
        geometry.tilt_matrix(61, 90, 0.0, 1.0),
        geometry.rotation_matrix(61, 90, 0.0, 1.0),
        geometry.shear_matrix(61, 90, 0.0, vertical=True),
    ]
    for matrix in matrices:
        np.testing.assert_allclose(matrix, np.eye(3), atol=1e-12)
        np.testing.assert_array_equal(warps.project(image, np.eye(3)), image)


def test_a_matrix_moves_the_image_forwards_and_what_is_missing_is_reflected():
    image = smooth_picture(1, 50, 70)
    moved = warps.project(image, np.array([[1.0, 0, 10], [0, 1, -4], [0, 0, 1]]))
    np.testing.assert_array_equal(moved[:-4, 10:], image[4:, :-10])
    np.testing.assert_array_equal(moved[:-4, :10], image[4:, 10:0:-1])
    np.testing.assert_array_equal(moved[-4:, 10:], image[-2:-6:-1, :-10])


def test_places_are_sampled_bilinearly():
    image = smooth_picture(2, 30, 40)
    here = np.stack(np.meshgrid(np.arange(40), np.arange(30)), axis=-1).astype(np.float32)
    found = warps.resample(image, here + np.float32([0.25, 0.5]))
    pixels = image.astype(float)
    rows = (pixels[:-1] + pixels[1:]) / 2
    expected = 0.75 * rows[:, :-1] + 0.25 * rows[:, 1:]
    assert np.abs(found[:-1, :-1] - expected).max() <= 1


# Elastic


@pytest.mark.parametrize("size", [(60, 60), (150, 200), (300, 90)])
def test_elastic_displacements_have_their_rms(size):
    for rms_px in (0.5, 3.0):
        field = geometry.elastic_displacement(*size, rms_px, generator(3)).astype(float)
        assert field.shape == (*size, 2)
        assert np.sqrt((field**2).sum(axis=-1).mean()) == pytest.approx(rms_px, rel=0.03)


def test_elastic_displacements_are_alike_nearby_and_correlate_as_far_as_is_stated():
    reach = round(SIDE * 7 / 32)
    near, far = [], []
    for seed in range(30):
        field = geometry.elastic_displacement(SIDE, SIDE, 1.0, generator(seed)).astype(float)
        for axis in (0, 1):
            near.append(np.sqrt(np.mean(np.diff(field, axis=axis) ** 2)))
            along = np.swapaxes(field, 0, axis)
            far.append((along[reach:] * along[:-reach]).mean() / (field**2).mean())
    assert max(near) < 0.03
    assert np.mean(far) == pytest.approx(math.exp(-1), abs=0.07)


@pytest.mark.parametrize("level", LEVELS)
def test_elastic_moves_the_image_by_its_field_and_never_folds_it(level):
    rms_px = scale("elastic", level) * SIDE
    for seed in range(8):
        field = geometry.elastic_displacement(SIDE, SIDE, rms_px, generator(seed)).astype(float)
        across, down = np.diff(field, axis=1)[:-1], np.diff(field, axis=0)[:, :-1]
        area = (1 + across[..., 0]) * (1 + down[..., 1]) - across[..., 1] * down[..., 0]
        assert area.min() > 0
        y, x = np.indices((SIDE, SIDE))
        moved = places("elastic", level, seed) - np.stack([x, y], axis=-1)
        inner = slice(40, -40)
        assert np.abs(moved - field)[inner, inner].max() < 0.75


# Perspective


@pytest.mark.parametrize("direction", [0.0, 0.7, 2.0, 4.5])
def test_a_tilted_pictures_corners_are_where_a_camera_sees_them(direction):
    height, width, tilt = 120, 200, 0.4
    matrix = geometry.tilt_matrix(height, width, tilt, direction)
    axis = np.array([math.cos(direction), math.sin(direction), 0])
    turn, _ = cv2.Rodrigues(tilt * axis)
    distance = 1.25 * width
    camera = np.diag([distance / math.cos(tilt) ** 0.5] * 2 + [1])
    for corner in ((0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)):
        middle = np.array([(width - 1) / 2, (height - 1) / 2])
        place = turn @ [*(corner - middle), 0] + [0, 0, distance]
        seen = camera @ place
        expected = seen[:2] / seen[2] + middle
        mapped = matrix @ [*corner, 1]
        np.testing.assert_allclose(mapped[:2] / mapped[2], expected, atol=1e-9)


def test_a_tilt_keeps_the_middle_and_its_area_and_shrinks_the_far_half():
    matrix = geometry.tilt_matrix(SIDE, SIDE, 0.6, 0.0)
    points = np.array([[MIDDLE, MIDDLE, 1], [MIDDLE + 1e-4, MIDDLE, 1], [MIDDLE, MIDDLE + 1e-4, 1]]).T
    x, y, w = matrix @ points
    middle, right, below = (np.stack([x, y]) / w).T
    np.testing.assert_allclose(middle, MIDDLE)
    assert np.linalg.det(np.stack([right - middle, below - middle])) == pytest.approx(1e-8, rel=1e-3)
    ends = matrix @ np.array([[0, 0, 1], [SIDE - 1, 0, 1], [0, SIDE - 1, 1], [SIDE - 1, SIDE - 1, 1]]).T
    ends = ends[0] / ends[2]
    widths = sorted([abs(ends[1] - ends[0]), abs(ends[3] - ends[2])])
    assert widths[0] < 0.8 * widths[1]


@pytest.mark.parametrize("level", LEVELS)
def test_perspective_warp_maps_the_image_by_the_drawn_tilt(level):
    tilt = math.radians(scale("perspective_warp", level))
    y, x = np.indices((SIDE, SIDE))
    for seed in range(5):
        direction = generator(seed).uniform(0, 2 * math.pi)
        inverse = np.linalg.inv(geometry.tilt_matrix(SIDE, SIDE, tilt, direction))
        u, v, w = inverse @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
        expected = np.stack([u / w, v / w], axis=-1).reshape(SIDE, SIDE, 2)
        inside = ((expected > 1) & (expected < SIDE - 2)).all(axis=-1)
        assert inside.mean() > 0.6
        assert np.abs(places("perspective_warp", level, seed) - expected)[inside].max() <= 0.75


@pytest.mark.parametrize("name", ["perspective_warp", "rotate_scale", "shear"])
def test_straight_lines_stay_straight(name):
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    cv2.line(image, (150, 30), (165, 210), (255, 255, 255), 3, cv2.LINE_AA)
    # The line crosses these, and its reflections are outside.
    rows, columns = np.arange(75, 165), np.arange(40, 220)
    for seed in range(4):
        line = OPERATIONS[name](image, 5, generator(seed))[rows][:, columns, 0].astype(float)
        middles = line @ columns / line.sum(axis=1)
        assert np.abs(middles - np.polyval(np.polyfit(rows, middles, 1), rows)).max() < 0.15


# Lenses


@pytest.mark.parametrize("size", [(150, 200), (200, 150), (100, 100), (17, 233)])
def test_radial_sources_are_browns_model_and_stay_within_the_frame(size):
    height, width = size
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    for k1 in (*OPERATIONS["barrel"].scales, *OPERATIONS["pincushion"].scales):
        sources = geometry.radial_sources(height, width, k1).astype(float)
        half_diagonal = np.hypot(*middle)
        y, x = np.indices(size)
        radius = np.hypot(x - middle[0], y - middle[1]) / half_diagonal
        found = np.hypot(*(sources - middle).transpose(2, 0, 1)) / half_diagonal
        away = radius > 0.05
        enlarged = found[away] / (radius * (1 + k1 * radius**2))[away]
        assert np.ptp(enlarged) < 1e-3
        assert sources.min() > -0.01 and (sources.max(axis=(0, 1)) < 2 * middle + 0.01).all()
        # As large as possible: some place of the frame's rim is shown.
        assert min(sources[..., 0].min(), sources[..., 1].min()) < 0.5


def test_a_straight_line_bows_outwards_in_a_barrel_and_inwards_in_a_pincushion():
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    # A vertical line right of the middle.
    image[:, 175:178] = 255
    for name, sign in (("barrel", 1), ("pincushion", -1)):
        bows = []
        for level in LEVELS:
            lines = OPERATIONS[name](image, level, generator())[..., 0].astype(float)
            columns = (lines * np.arange(SIDE)).sum(axis=1) / lines.sum(axis=1)
            bows.append(sign * (columns[SIDE // 2] - (columns[20] + columns[-20]) / 2))
        assert bows[0] > 0.5 and all(low < high for low, high in pairwise(bows))


# Rotation, zoom and shear


@pytest.mark.parametrize("level", LEVELS)
def test_rotate_scale_turns_and_zooms_within_its_limits_in_both_directions(level):
    limits = np.array([scale("rotate_scale", level), 0.012 * scale("rotate_scale", level)])
    drawn = []
    for seed in range(20):
        matrix = linear_map("rotate_scale", level, seed)
        turn = complex(matrix[0, 0], matrix[1, 0])
        # Nothing but a turn and a zoom.
        assert abs(complex(matrix[1, 1], -matrix[0, 1]) - turn) < 0.01
        drawn.append([math.degrees(np.angle(turn)), math.log(abs(turn))])
    shares = np.array(drawn) / limits
    tolerance = 0.2 / limits[0] + 0.02
    assert (np.abs(shares) > 0.5 - tolerance).all() and (np.abs(shares) < 1 + tolerance).all()
    assert len(np.unique(np.sign(shares), axis=0)) == 4


def test_a_rotation_matrix_turns_and_zooms_about_the_middle():
    matrix = geometry.rotation_matrix(101, 201, 0.3, 1.1)
    np.testing.assert_allclose(matrix @ [100, 50, 1], [100, 50, 1])
    x, y, _ = matrix @ [160, 50, 1]
    assert math.atan2(y - 50, x - 100) == pytest.approx(0.3)
    assert math.hypot(y - 50, x - 100) == pytest.approx(66)


@pytest.mark.parametrize("level", LEVELS)
def test_shear_leans_one_kind_of_lines_by_its_angle(level):
    slope = math.tan(math.radians(scale("shear", level)))
    seen = set()
    for seed in range(16):
        matrix = linear_map("shear", level, seed)
        leaning = max([(0, 1), (1, 0)], key=lambda place: abs(matrix[place]))
        expected = np.eye(2)
        expected[leaning] = math.copysign(slope, matrix[leaning])
        np.testing.assert_allclose(matrix, expected, atol=0.006)
        seen.add((leaning, matrix[leaning] > 0))
    assert len(seen) == 4


@pytest.mark.parametrize("vertical", [True, False])
def test_a_shear_matrix_tells_which_lines_lean(vertical):
    matrix = geometry.shear_matrix(80, 120, 0.2, vertical)
    along = {"vertical": np.array([0, 1, 0]), "horizontal": np.array([1, 0, 0])}
    leaning, still = ("vertical", "horizontal") if vertical else ("horizontal", "vertical")
    np.testing.assert_allclose(matrix @ along[still], along[still])
    lean = matrix @ along[leaning] @ along[leaning] / np.linalg.norm(matrix @ along[leaning])
    assert math.acos(lean) == pytest.approx(0.2)
