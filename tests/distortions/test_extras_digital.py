"""Digital faults of the extras: every operation does what its name says."""

import numpy as np
import pytest
from conftest import smooth_picture

from featdistill.distortions.extras.digital import OPERATIONS, block_means
from featdistill.distortions.operation import LEVELS


def apply(name: str, image: np.ndarray, level: int, seed: int = 0) -> np.ndarray:
    return OPERATIONS[name](image, level, np.random.default_rng(seed))


def places_image(height: int, width: int) -> np.ndarray:
    """Every pixel says where it is: row and column in the first two channels."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.indices((height, width))
    return image


@pytest.mark.parametrize("level", LEVELS)
def test_a_glitch_turns_bands_of_rows_round_and_each_channel_by_its_own_distance(level):
    height, width = 200, 150
    image = np.tile(np.arange(width, dtype=np.uint8)[None, :, None], (height, 1, 3))
    image = np.random.default_rng(1).permuted(image, axis=1)
    share, found = OPERATIONS["digital_glitch"].scales[level - 1], []
    for seed in range(4):
        glitched = apply("digital_glitch", image, level, seed)
        shifts = np.argmax(glitched == image[:, :1], axis=1)
        back = (np.arange(width)[None, :, None] - shifts[:, None]) % width
        np.testing.assert_array_equal(np.take_along_axis(image, back, axis=1), glitched)
        shifts = (shifts + width // 2) % width - width // 2
        moved = shifts.any(axis=1)
        assert share <= moved.mean() <= share + 0.09
        assert (np.diff(shifts, axis=1) != 0).any(axis=1)[moved].all()
        # Bands, not single rows: most rows move as the one above does.
        assert (np.diff(shifts, axis=0) == 0).all(axis=1)[moved[1:]].mean() > 0.5
        found.append(np.abs(shifts).max())
    assert max(found) <= (0.3 + 0.05) * np.sqrt(share) * width + 2


@pytest.mark.parametrize("size", [(96, 96), (70, 50), (17, 23)])
@pytest.mark.parametrize("level", LEVELS)
def test_shuffled_pixels_are_all_there_and_in_their_blocks(size, level):
    height, width = size
    side = OPERATIONS["pixel_shuffle"].scales[level - 1]
    image = places_image(height, width)
    shuffled = apply("pixel_shuffle", image, level)
    places = shuffled[..., 0].astype(int) * width + shuffled[..., 1]
    np.testing.assert_array_equal(np.sort(places.ravel()), np.arange(height * width))
    distance = np.abs(shuffled.astype(int) - image)[..., :2].max(axis=2)
    assert distance.max() <= 2 * (side - 1)
    assert (distance > 0).mean() > 0.6
    # Blocks that overlap no other one keep their pixels.
    rows, columns = (length // side - 1 if length % side else length // side for length in size)
    own = (shuffled // side)[: rows * side, : columns * side, :2]
    np.testing.assert_array_equal(own, (image // side)[: rows * side, : columns * side, :2])
    offsets = (shuffled % side)[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    orders = {order.tobytes() for row in offsets.transpose(0, 2, 1, 3, 4) for order in row}
    assert len(orders) >= min(8, rows * columns)


@pytest.mark.parametrize("level", LEVELS)
def test_blockiness_flattens_blocks_as_far_as_its_bound_allows(level):
    most = OPERATIONS["jpeg_blockiness"].scales[level - 1]
    image = smooth_picture(2, 90, 110)
    blocky = apply("jpeg_blockiness", image, level)
    change = np.abs(blocky.astype(int) - image)
    assert change.max() == most
    means = block_means(image, 8)
    left = np.abs(blocky.astype(int) - means)
    np.testing.assert_array_equal(left, np.maximum(np.abs(image.astype(int) - means) - most, 0))


@pytest.mark.parametrize("level", LEVELS)
def test_blockiness_shows_at_multiples_of_8_px_and_keeps_edges(level):
    ramp = np.linspace(60, 190, 256).astype(np.uint8)
    ramp = np.repeat(np.repeat(ramp[None, :, None], 32, axis=0), 3, axis=2)
    steps = np.abs(np.diff(apply("jpeg_blockiness", ramp, level)[0, :, 0].astype(int)))
    at_edges = steps[7::8]
    assert at_edges.mean() > 3 * np.delete(steps, np.s_[7::8]).mean() + 1
    # An edge in the middle of a block stays where it is.
    edge = np.full((16, 16, 3), 30, np.uint8)
    edge[:, 12:] = 220
    row = apply("jpeg_blockiness", edge, level)[0, :, 0].astype(int)
    assert np.argmax(np.diff(row)) == 11 and row[12] - row[11] >= 190 - 2 * 22


def test_salt_and_pepper_are_whole_pixels_of_the_share_and_the_lower_levels_ones_too():
    image = np.clip(smooth_picture(3, 300, 300), 1, 254)
    before = np.zeros(image.shape[:2], bool)
    for level in LEVELS:
        result = apply("salt_and_pepper", image, level)
        struck = (result != image).any(axis=2)
        assert set(np.unique(result[struck])) == {0, 255}
        assert np.ptp(result[struck], axis=1).max() == 0
        share = OPERATIONS["salt_and_pepper"].scales[level - 1]
        assert struck.mean() == pytest.approx(share, rel=0.15)
        assert (result[struck][:, 0] == 255).mean() == pytest.approx(0.5, abs=0.1)
        assert struck[before].all()
        before = struck


@pytest.mark.parametrize("size", [(120, 210), (17, 233), (64, 45)])
@pytest.mark.parametrize("level", LEVELS)
def test_pixelate_gives_every_square_its_mean(size, level):
    side = OPERATIONS["pixelate"].scales[level - 1]
    image = np.random.default_rng(4).integers(0, 256, (*size, 3), dtype=np.uint8)
    squares = apply("pixelate", image, level)
    for top in range(0, size[0], side):
        for left in range(0, size[1], side):
            area = np.s_[top : top + side, left : left + side]
            assert np.ptp(squares[area], axis=(0, 1)).max() == 0
            assert np.abs(squares[area][0, 0] - image[area].mean(axis=(0, 1))).max() <= 0.51
