"""Inputs whose size depends on the image: the side that an image gets, and batches of several sizes."""

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image
from test_dataset import make_train

from featdistill.command_line import UserError
from featdistill.data.cutmix import draw_box
from featdistill.data.loading import Broken, ScoreDataset, collate
from featdistill.data.mixed_sizes import MixedSizes, batch_pieces, pieces, stack
from featdistill.data.preprocessing import Place, Preprocessing, fit, parse_sizes, prepare, side_of
from featdistill.data.views import cut_view, parse_tta
from featdistill.distortions.plan import apply_plan
from featdistill.distortions.policy import DistortionPolicy
from featdistill.images.reading import limit_side, read_image
from featdistill.records.manifest import read_manifest
from featdistill.seeds import training_generator

SIDES = (16, 24, 40)


def test_an_image_gets_the_largest_side_that_it_has_or_else_the_smallest():
    for shape, expected in (((16, 99), 16), ((5, 5), 16), ((23, 400), 16), ((24, 24), 24), ((900, 39), 24)):
        assert side_of(np.zeros((*shape, 3), np.uint8), SIDES) == expected
    assert side_of(np.zeros((4000, 3000, 3), np.uint8), SIDES) == 40
    assert side_of(np.zeros((4000, 3000, 3), np.uint8), 224) == 224


@pytest.mark.parametrize("resize", ["shorter", "squash", "crop"])
def test_it_is_fitted_like_an_input_of_that_side(resize):
    _, views = parse_tta("hflip+scales+five_crop+blur")
    for shape, limit, side in (((30, 70), None, 24), ((90, 60), None, 40), ((90, 60), 40, 24)):
        image = smooth_picture(3, *shape)
        assert torch.equal(prepare(image, SIDES, resize, limit), prepare(image, side, resize, limit))
        place = Place(0.2, 0.9, True, 0.5, 1.2)
        assert np.array_equal(
            fit(image, SIDES, resize, place=place), fit(image, side_of(image, SIDES), resize, place=place)
        )
        for view in views:
            found = cut_view(image, SIDES, resize, limit, view=view)
            assert torch.equal(found, cut_view(image, side, resize, limit, view=view))
    assert side_of(limit_side(smooth_picture(3, 90, 60), 40), SIDES) == 24


def test_sides_are_written_as_a_list():
    assert parse_sizes(" 768,384, 768") == (384, 768) and parse_sizes(None) == ()
    for text in ("", "384,", "384-768", "-1", "3.5", "٣"):
        with pytest.raises(UserError, match="sides in px, such as 384,768,1152"):
            parse_sizes(text)


def test_preprocessing_describes_its_sides_only_if_it_has_several():
    plain = Preprocessing(24, "squash", (0.5,) * 3, (0.5,) * 3)
    several = Preprocessing(16, "squash", (0.5,) * 3, (0.5,) * 3, 100, SIDES)
    assert (plain.key, several.key) == ((24, "squash"), (SIDES, "squash", 100))
    assert "sizes" not in plain.describe() and several.describe()["sizes"] == SIDES
    assert (plain.span, several.span) == ("24 px", "16 to 40 px")
    plain.require_one_size("it")
    with pytest.raises(UserError, match="it needs inputs of one size; those of this expert have 16 to 40 px"):
        several.require_one_size("it")


def squares(sides):
    return [torch.full((3, side, side), number, dtype=torch.uint8) for number, side in enumerate(sides)]


def test_images_that_differ_in_size_are_stacked_by_size():
    assert torch.equal(stack(squares([8, 8])), torch.stack(squares([8, 8])))
    mixed = stack(squares([40, 16, 24, 16, 40]))
    assert isinstance(mixed, MixedSizes) and mixed.positions == [[1, 3], [2], [0, 4]]
    assert [tuple(one.shape) for one in mixed.stacks] == [(2, 3, 16, 16), (1, 3, 24, 24), (2, 3, 40, 40)]
    assert [one[:, 0, 0, 0].tolist() for one in mixed.stacks] == mixed.positions
    ramp = stack([torch.arange(side).to(torch.uint8).expand(3, side, side) for side in (8, 16)])
    assert [one[0, 0, 0, 0] for one in ramp.flip(-1).stacks] == [7, 15]
    assert ramp.to("cpu", non_blocking=True).positions == ramp.positions


def test_pieces_are_of_one_size_and_need_no_more_memory_than_a_batch_of_the_smallest_side():
    sides = [40, 16, 40, 24, 16, 40, 24, 40]
    found = list(pieces(stack(squares(sides)), 16))
    # 8 images of 16 px have as many pixels as 3 of 24 px, or 1 of 40 px.
    assert [positions for _, positions in found] == [[1, 4], [3, 6], [0], [2], [5], [7]]
    for images, positions in found:
        assert images[:, 0, 0, 0].tolist() == positions
        assert {images.shape[-1]} == {sides[at] for at in positions}
    alike = list(pieces(torch.stack(squares([40] * 8)), 16))
    assert [positions for _, positions in alike] == [[at] for at in range(8)]
    ((whole, positions),) = pieces(torch.stack(squares([16] * 8)), 16)
    assert len(whole) == 8 and positions == list(range(8))


def test_a_training_batch_is_divided_with_all_its_entries():
    sides = [40, 16, 24, 16]
    batch = {"images": stack(squares(sides)), "images_clean": stack(squares(sides))}
    batch |= {"label": torch.tensor([0.0, 0.1, 0.2, 0.3]), "index": torch.arange(4)}
    found = list(batch_pieces(batch, 16))
    assert [piece["index"].tolist() for piece in found] == [[1, 3], [2], [0]]
    for piece in found:
        assert piece.keys() == batch.keys()
        assert torch.equal(piece["images"], piece["images_clean"])
        assert piece["images"][:, 0, 0, 0].tolist() == piece["index"].tolist()
        assert torch.equal(piece["label"], batch["label"][piece["index"]])


@pytest.fixture
def rows(make_set, tmp_path):
    """Four images of other sizes, each with the side of its place in (16, 40, 24, 24)."""
    rows, images = read_manifest(make_set("train", 4)), []
    for number, shape in enumerate([(18, 30), (60, 50), (44, 36), (24, 80)]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(smooth_picture(number, *shape)).save(path)
        images.append(str(path))
    return rows.assign(image=images)


SEVERAL = Preprocessing(16, "shorter", (0.5,) * 3, (0.5,) * 3, sizes=SIDES)


def test_scored_images_have_their_own_sides_next_to_inputs_of_one_size(rows):
    dataset = ScoreDataset(rows, [SEVERAL.key, (24, "squash")])
    items = [dataset[number] for number in range(4)]
    images = collate([*items[:2], Broken(7, "bad"), *items[2:]])["images"]
    assert images[SEVERAL.key].positions == [[0], [2, 3], [1]]
    assert images[24, "squash"].shape == (4, 3, 24, 24)


@pytest.mark.parametrize("distort_at", ["native", "input"])
def test_all_views_of_a_training_image_have_the_side_of_the_distorted_one(rows, distort_at):
    policy = DistortionPolicy(
        libraries={"evaluation": 1}, include=("downscale",), max_operations=1, distort_at=distort_at
    )
    options = {"preprocessing": SEVERAL, "views": ("clean", "other"), "crop": "center", "flip": 0.0}
    dataset = make_train(rows, policy, **options)
    sides, undistorted = [], []
    for epoch in range(3):
        for index in range(4):
            image = read_image(rows["image"][index])
            plan = dataset.draw(epoch, index)[0]["images"]
            seen = apply_plan(image, plan) if distort_at == "native" else image
            side = side_of(seen, SIDES)
            item = dataset[epoch, index]
            shapes = {tuple(item[view].shape) for view in ("images", "images_clean", "images_other")}
            assert shapes == {(3, side, side)}
            assert torch.equal(item["images_clean"], prepare(image, side, "shorter"))
            sides.append(side)
            undistorted.append(side_of(image, SIDES))
    assert len(set(sides)) > 1 and (sides == undistorted) == (distort_at == "input")


def test_a_pasted_box_comes_from_an_image_of_the_same_side(rows):
    policy = DistortionPolicy(probability=0.0)
    options = {"preprocessing": SEVERAL, "crop": "center", "flip": 0.0}
    mixed = make_train(rows, policy, cutmix=1.0, **options)
    for epoch in range(4):
        for index in range(4):
            rng = training_generator(3, 1, epoch, index, 3)
            rng.random()
            other = int(4 * rng.random())
            image, pasted = (read_image(rows["image"][row]) for row in (index, other))
            side = side_of(image, SIDES)
            box, item = draw_box(side, 1.0, rng), mixed[epoch, index]
            expected, inside = prepare(image, side, "shorter"), prepare(pasted, side, "shorter")
            part = (slice(None), slice(box.top, box.bottom), slice(box.left, box.right))
            expected[part] = inside[part]
            assert torch.equal(item["images"], expected)
            share = box.share(side)
            label = (1 - share) * rows["label"][index] + share * rows["label"][other]
            assert item["label"] == pytest.approx(label, abs=1e-12)


def test_mixed_amplitudes_come_from_an_input_of_the_same_side(rows):
    dataset = make_train(rows, DistortionPolicy(probability=0.0), preprocessing=SEVERAL, amplitude_mixup=1.0)
    assert [dataset[0, index]["images"].shape[-1] for index in range(4)] == [16, 40, 24, 24]
