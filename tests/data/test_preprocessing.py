import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image

from featdistill.data.preprocessing import Place, before_crop, fit, offset, prepare


def as_image(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("height", "width"), [(72, 88), (200, 131), (48, 90), (30, 40), (301, 160)])
def test_the_shorter_side_is_resized_as_pillows_antialiased_bicubic_does(height, width):
    picture = smooth_picture(0, height, width)
    shorter = min(height, width)
    resized = Image.fromarray(picture).resize((48 * width // shorter, 48 * height // shorter), Image.BICUBIC)
    top, left = (resized.height - 48) // 2, (resized.width - 48) // 2
    expected = np.asarray(resized)[top : top + 48, left : left + 48].astype(int)
    difference = np.abs(as_image(prepare(picture, 48, "shorter")).astype(int) - expected)
    assert difference.max() <= 2 and (difference > 0).mean() <= 0.01


def test_squash_takes_the_whole_image_and_crop_does_not_resize():
    picture = smooth_picture(1, 60, 100)
    expected = np.asarray(Image.fromarray(picture).resize((32, 32), Image.BICUBIC)).astype(int)
    assert np.abs(as_image(prepare(picture, 32, "squash")).astype(int) - expected).max() <= 2
    np.testing.assert_array_equal(as_image(prepare(picture, 40, "crop")), picture[10:50, 30:70])


def test_an_image_smaller_than_the_crop_is_tiled():
    picture = smooth_picture(2, 20, 30)
    tiled = np.tile(picture, (3, 2, 1))
    np.testing.assert_array_equal(as_image(prepare(picture, 48, "crop")), tiled[6:54, 6:54])


@pytest.mark.parametrize("height,width", [(1, 30_000), (20_000, 3), (1, 1)])
def test_a_strip_is_fitted_without_enlarging_all_of_it(height, width):
    picture = np.zeros((height, width, 3), np.uint8)
    picture[...] = np.linspace(0, 255, width)[:, None] if width > height else 128
    middle, end = (as_image(prepare(picture, 48, "shorter", place=place)) for place in (Place(), Place(1, 1)))
    assert middle.shape == end.shape == (48, 48, 3)
    assert 126 <= middle.mean() <= 129
    if width > height:
        assert end.mean() > 250


def test_a_place_moves_the_crop_and_mirrors_it():
    picture = smooth_picture(3, 50, 70)
    np.testing.assert_array_equal(
        as_image(prepare(picture, 40, "crop", place=Place(0, 0))), picture[:40, :40]
    )
    found = as_image(prepare(picture, 40, "crop", place=Place(0.99, 0.99, True)))
    np.testing.assert_array_equal(found, picture[10:50, 30:70][:, ::-1])


def test_a_uniform_share_takes_every_position_equally_often_and_the_center_is_torchvisions():
    for space in (1, 2, 9):
        counts = np.bincount([offset((step + 0.25) / 10_000, space) for step in range(10_000)])
        assert len(counts) == space + 1
        np.testing.assert_allclose(counts / 10_000, 1 / (space + 1), atol=2e-4)
    assert [offset(share, 0) for share in (0.0, 0.5, 0.99)] == [0, 0, 0]
    assert [offset(share, 7) for share in (0.0, 1.0)] == [0, 7] and offset(0.3, -5) == 0
    assert [offset(0.5, space) for space in (1, 2, 3, 4)] == [0, 1, 2, 2]


def test_a_box_has_its_share_of_the_area_and_its_aspect_ratio_and_is_resized_alone():
    picture = smooth_picture(4, 120, 160)
    height, width = 80, 120  # 0.5 of the area at 3 : 2
    expected = prepare(picture[20:100, 20:140], 48, "squash")
    box = Place(0.5, 0.5, False, 0.5, 1.5)
    assert torch.equal(prepare(picture, 48, "shorter", place=box), expected)
    assert torch.equal(prepare(picture, 48, "squash", place=box), expected)
    corner = Place(0.999999, 0.0, True, 0.5, 1.5)
    found = as_image(prepare(picture, 48, "shorter", place=corner))
    end = 120 - height
    np.testing.assert_array_equal(
        found[:, ::-1], as_image(prepare(picture[end : end + height, :width], 48, "squash"))
    )


@pytest.mark.parametrize(("area", "aspect", "box"), [(1.0, 1.0, (60, 60)), (0.9, 4 / 3, (60, 80))])
def test_a_box_that_does_not_fit_is_the_largest_of_its_shape(area, aspect, box):
    picture = smooth_picture(5, 60, 240)
    left = (240 - box[1]) // 2
    expected = prepare(picture[:, left : left + box[1]], 32, "squash")
    assert torch.equal(prepare(picture, 32, "shorter", place=Place(area=area, aspect=aspect)), expected)


@pytest.mark.parametrize("resize", ["shorter", "squash", "crop"])
@pytest.mark.parametrize("sides", [(72, 88), (300, 131), (31, 40), (20, 700), (900, 40), (1, 5), (48, 48)])
def test_an_image_before_its_crop_is_fitted_to_the_same_pixels(resize, sides):
    picture = smooth_picture(6, *sides)
    kept = before_crop(picture, 48, resize)
    kept.flags.writeable = False
    for place in (Place(), Place(0.13, 0.77, True), Place(0.99, 0.01)):
        expected = fit(picture, 48, resize, place=place)
        np.testing.assert_array_equal(fit(kept, 48, resize, place=place), expected)
        assert expected.shape == (48, 48, 3) and not np.shares_memory(expected, picture)
    if resize != "crop" and max(sides) <= 16 * min(sides):
        assert min(kept.shape[:2]) == 48
