"""Occlusion of the extended library: every operation does what its name says."""

from itertools import pairwise

import cv2
import numpy as np
import pytest
from conftest import smooth_picture

from featdistill.distortions.extended import occlusion
from featdistill.distortions.extended.occlusion import OPERATIONS, draw_drops
from featdistill.distortions.operation import LEVELS

# A value that neither black nor the mean of an image of two halves has, and noise hardly ever.
LEFT, RIGHT = (250, 3, 101), (2, 241, 77)


def apply(name: str, image: np.ndarray, level: int, seed: int = 0) -> np.ndarray:
    return OPERATIONS[name](image, level, np.random.default_rng(seed))


def halves(height: int, width: int) -> np.ndarray:
    image = np.full((height, width, 3), LEFT, np.uint8)
    image[:, width // 2 :] = RIGHT
    return image


def test_the_category_has_its_two_operations_and_none_keeps_the_layout():
    assert list(OPERATIONS) == ["random_occlusion", "water_drops"]
    assert all(operation.category == "occlusion" for operation in OPERATIONS.values())
    assert not any(operation.keeps_layout for operation in OPERATIONS.values())


# Random occlusion


@pytest.mark.parametrize("size", [(224, 224), (150, 400)])
@pytest.mark.parametrize("level", LEVELS)
def test_shapes_cover_the_stated_share(level, size):
    image, stated = halves(*size), OPERATIONS["random_occlusion"].scales[level - 1]
    for seed in range(15):
        changed = (apply("random_occlusion", image, level, seed) != image).any(axis=2)
        assert changed.mean() == pytest.approx(stated, rel=0.1)


def shapes(level: int, seed: int) -> list[tuple[str, str]]:
    """The kind and filling of every shape that lies apart from the others, told from the picture alone."""
    image = halves(224, 224)
    result = apply("random_occlusion", image, level, seed)
    mean = np.rint(image.reshape(-1, 3).mean(axis=0))
    found = []
    changed = (result != image).any(axis=2).astype(np.uint8)
    for place, (_, _, width, height, area) in enumerate(cv2.connectedComponentsWithStats(changed)[2]):
        if place == 0 or area < 60:
            continue
        inside = result[cv2.connectedComponents(changed)[1] == place].astype(int)
        if not inside.any():
            fill = "black"
        elif (inside == mean).all():
            fill = "mean"
        elif inside.std() > 60 and (inside > 0).any(axis=1).mean() > 0.99:
            fill = "noise"
        else:
            continue  # Several shapes that touch.
        share = area / (width * height)
        if 224 in (width, height) and share == 1:
            found.append(("strip", fill))
        elif share == 1:
            found.append(("rectangle", fill))
        elif share == pytest.approx(np.pi / 4, abs=0.05) and abs(width - height) <= 1:
            found.append(("disc", fill))
    return found


def test_all_kinds_and_fillings_come_up_in_all_pairs():
    found = {shape for seed in range(60) for shape in shapes(1, seed)}
    assert found == {(kind, fill) for kind in occlusion.KINDS for fill in occlusion.FILLS}


def test_noise_is_uniform_and_every_sample_is_drawn():
    pixels = []
    for seed in range(30):
        image = halves(224, 224)
        result = apply("random_occlusion", image, 5, seed)
        mean = np.rint(image.reshape(-1, 3).mean(axis=0))
        is_noise = (result != image).any(axis=2) & result.any(axis=2) & (result != mean).any(axis=2)
        pixels.append(result[is_noise])
    noise = np.concatenate(pixels).astype(float)
    assert len(noise) > 10000 and noise.mean() == pytest.approx(127.5, abs=1)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(3) * (256**2 - 1) / 12, atol=100)


def test_levels_of_one_seed_begin_with_the_same_kind_of_shape():
    for seed in range(8):
        kinds = []
        for level in LEVELS:
            rng = np.random.default_rng(seed)
            rng.integers(2**63)
            kinds.append(occlusion.KINDS[rng.integers(3)])
            assert (apply("random_occlusion", halves(96, 96), level, seed) != halves(96, 96)).any()
        assert len(set(kinds)) == 1


# Water drops


@pytest.mark.parametrize("size", [(224, 224), (300, 420), (64, 96)])
@pytest.mark.parametrize("level", LEVELS)
def test_drops_cover_the_stated_share_and_do_not_touch(level, size):
    stated = OPERATIONS["water_drops"].scales[level - 1]
    for seed in range(8):
        drops = draw_drops(size, stated, np.random.default_rng(seed))
        covered = sum(np.pi / 4 * side**2 for *_, side in drops) / np.prod(size)
        assert covered == pytest.approx(stated, rel=0.1)
        for place, (left, top, side) in enumerate(drops):
            assert min(left, top) >= 0 and left + side <= size[1] and top + side <= size[0]
            for other_left, other_top, other_side in drops[:place]:
                apart = np.hypot(
                    left + side / 2 - other_left - other_side / 2, top + side / 2 - other_top - other_side / 2
                )
                assert apart >= (side + other_side) / 2


def test_a_higher_level_has_more_drops_at_the_same_places():
    for seed in range(6):
        levels = [
            draw_drops((224, 224), share, np.random.default_rng(seed))
            for share in OPERATIONS["water_drops"].scales
        ]
        for fewer, more in pairwise(levels):
            assert fewer[:-1] == more[: len(fewer) - 1] and len(more) >= len(fewer)


def inside_drops(size: tuple[int, int], level: int, seed: int, wider_px: float = 0.0) -> np.ndarray:
    y, x = np.indices(size)
    covered = np.zeros(size, bool)
    share = OPERATIONS["water_drops"].scales[level - 1]
    for left, top, side in draw_drops(size, share, np.random.default_rng(seed)):
        covered |= np.hypot(x - left - (side - 1) / 2, y - top - (side - 1) / 2) < side / 2 + wider_px
    return covered


@pytest.mark.parametrize("level", LEVELS)
def test_outside_the_drops_every_pixel_stays_and_inside_most_change(level):
    image = np.random.default_rng(1).integers(0, 256, (200, 250, 3), dtype=np.uint8)
    for seed in range(4):
        changed = (apply("water_drops", image, level, seed) != image).any(axis=2)
        assert not changed[~inside_drops((200, 250), level, seed, 1)].any()
        assert changed[inside_drops((200, 250), level, seed)].mean() > 0.97


def test_what_is_seen_in_a_drop_comes_from_where_the_prism_of_its_slope_sends_the_sight():
    height, width = 256, 256
    # Column, row, and a third channel that tells the light lost, which is the same in all.
    image = np.dstack([*np.indices((height, width))[::-1], np.full((height, width), 255)]).astype(np.uint8)
    compared = 0
    for seed in range(8):
        result = apply("water_drops", image, 5, seed).astype(float)
        for left, top, side in draw_drops((height, width), 0.3, np.random.default_rng(seed)):
            x, y, radius = left + (side - 1) / 2, top + (side - 1) / 2, side / 2
            # The right half of the drop, where no light glints.
            for across, down in ((0.1, 0.0), (0.3, 0.2), (0.5, -0.1), (0.4, 0.55), (0.7, 0.1), (0.2, 0.8)):
                column, row = round(x + across * radius), round(y + down * radius)
                way = np.array([column - x, row - y])
                distance = np.hypot(*way) / radius
                # Slope of a sphere of 1.15 radii; deviation (n - 1) * slope; 10.6 radii to the scene.
                slope = distance / np.sqrt(1.15**2 - distance**2)
                seen = np.array([x, y]) + way - 0.33 * slope * 10.6 * radius * way / np.hypot(*way)
                if seen.min() < 2 or seen.max() > 253:
                    continue
                red, green, white = result[row, column]
                np.testing.assert_allclose(np.array([red, green]) * 255 / white, seen, atol=2.5)
                assert (seen - (x, y)) @ way < 0
                compared += 1
    assert compared > 150


def test_drops_are_dark_at_the_rim_and_have_a_glint():
    image = np.full((256, 256, 3), 150, np.uint8)
    result = apply("water_drops", image, 4)
    for left, top, side in draw_drops((256, 256), 0.2, np.random.default_rng(0)):
        drop = result[top : top + side, left : left + side, 0].astype(int)
        place = (np.arange(side) + 0.5) * 2 / side - 1
        distance = np.hypot(place, place[:, None])
        assert drop[(distance > 0.86) & (distance < 0.96)].mean() < 110
        assert drop[(distance < 0.5) & (place[:, None] > 0)].mean() > 125
        glint = np.unravel_index(np.argmax(drop), drop.shape)
        assert drop.max() > 220 and place[glint[0]] < 0 and place[glint[1]] < 0


def test_drops_lie_elsewhere_with_another_seed():
    image = smooth_picture(3, 90, 90)
    assert len({apply("water_drops", image, 1, seed).tobytes() for seed in range(5)}) == 5
