"""CutMix: labels in proportion to areas, pixels outside the box, one box for all views, determinism."""

import numpy as np
import pytest
import torch
from test_dataset import PREPROCESSING, make_train

from featdistill.data.cutmix import Box, draw_box, paste
from featdistill.data.loading import Broken, collate
from featdistill.distortions.policy import DistortionPolicy
from featdistill.records.manifest import read_manifest
from featdistill.seeds import training_generator

SIZE = PREPROCESSING.size


def test_the_area_of_a_box_is_drawn_from_the_beta_distribution():
    for alpha in (1.0, 0.3):
        rng = np.random.default_rng(1)
        boxes = [draw_box(224, alpha, rng) for _ in range(4000)]
        assert all(0 <= b.top <= b.bottom <= 224 and 0 <= b.left <= b.right <= 224 for b in boxes)
        inside = [b for b in boxes if min(b.top, b.left) > 0 and max(b.bottom, b.right) < 224]
        assert {b.bottom - b.top - (b.right - b.left) for b in inside} == {0}
        # Cut off at the borders, boxes are smaller than drawn: against a simulation in floats.
        simulated = np.random.default_rng(2)
        half = np.sqrt(1 - simulated.beta(alpha, alpha, 200_000)) / 2
        middle = simulated.random((2, 200_000))
        sides = np.clip(middle + half, 0, 1) - np.clip(middle - half, 0, 1)
        shares = [b.share(224) for b in boxes]
        assert np.mean(shares) == pytest.approx(np.mean(sides[0] * sides[1]), abs=0.015)
    assert Box(0, 10, 30, 50).share(60) == pytest.approx(30 * 40 / 3600)


def test_pasting_changes_the_box_alone():
    rng = np.random.default_rng(0)
    square, other = (rng.integers(0, 256, (20, 20, 3), np.uint8) for _ in range(2))
    mixed = paste(square, other, Box(3, 5, 9, 20))
    expected = square.copy()
    expected[3:9, 5:20] = other[3:9, 5:20]
    assert np.array_equal(mixed, expected) and not np.array_equal(square, mixed)


@pytest.fixture
def rows(make_set):
    return read_manifest(make_set("train", 8))


@pytest.mark.parametrize("views", [(), ("clean",), ("clean", "other")])
def test_each_view_shows_the_same_view_of_another_row_in_the_same_box(rows, views):
    plain, mixed = make_train(rows, views=views), make_train(rows, views=views, cutmix=1.0)
    for epoch in range(3):
        for index in range(8):
            rng = training_generator(3, 1, epoch, index, 3)
            assert rng.random() < 1
            other = int(8 * rng.random())
            box = draw_box(SIZE, 1.0, rng)
            own, pasted, found = plain[epoch, index], plain[epoch, other], mixed[epoch, index]
            for view in ("images", *(f"images_{name}" for name in views)):
                expected = own[view].clone()
                expected[:, box.top : box.bottom, box.left : box.right] = pasted[view][
                    :, box.top : box.bottom, box.left : box.right
                ]
                assert torch.equal(found[view], expected)
            share = (box.bottom - box.top) * (box.right - box.left) / SIZE**2
            expected = (1 - share) * rows["label"][index] + share * rows["label"][other]
            assert found["label"] == pytest.approx(expected, abs=1e-12)
            assert (found["epoch"], found["index"]) == (epoch, index)


def test_an_item_is_a_function_of_seed_stage_epoch_and_index(rows):
    first, again = make_train(rows, cutmix=1.0), make_train(rows, cutmix=1.0)
    _ = [again[0, index] for index in (5, 1)]
    assert torch.equal(first[0, 2]["images"], again[0, 2]["images"])
    assert first[0, 2]["label"] == again[0, 2]["label"]
    others = (
        first[1, 2],
        make_train(rows, cutmix=1.0, stage=2)[0, 2],
        make_train(rows, cutmix=1.0, seed=4)[0, 2],
    )
    assert len({first[0, 2]["label"], *(other["label"] for other in others)}) >= 3


def test_a_share_of_the_images_is_mixed_and_the_others_are_untouched(rows):
    plain, mixed = make_train(rows), make_train(rows, cutmix=0.5, cutmix_alpha=20.0)
    changed = 0
    for epoch in range(10):
        for index in range(8):
            one, other = plain[epoch, index], mixed[epoch, index]
            if torch.equal(one["images"], other["images"]):
                assert one["label"] == other["label"] == rows["label"][index]
            else:
                changed += 1
    assert 0.3 < changed / 80 < 0.65


def test_rows_are_pasted_as_often_as_they_appear_in_an_epoch(rows):
    weights = np.where(np.arange(8) == 3, 9.0, 1.0)
    rows = rows.assign(label=[1 if row == 3 else 0 for row in range(8)])
    dataset = make_train(rows, cutmix=1.0, weights=weights)
    drawn = []
    for epoch in range(60):
        rng = training_generator(3, 1, epoch, 0, 3)
        rng.random()
        drawn.append(rng.random() * 16)
        box = draw_box(SIZE, 1.0, rng)
        expected = box.share(SIZE) if 3 <= drawn[-1] < 12 else 0.0
        assert dataset[epoch, 0]["label"] == pytest.approx(expected, abs=1e-12)
    assert 0.35 < np.mean([3 <= one < 12 for one in drawn]) < 0.75


def test_a_row_that_cannot_be_read_is_not_pasted(rows, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    rows = rows.assign(image=[rows["image"][0], *[str(bad)] * 7])
    plain, mixed = make_train(rows), make_train(rows, cutmix=1.0, cutmix_alpha=5.0)
    for epoch in range(6):
        rng = training_generator(3, 1, epoch, 0, 3)
        rng.random()
        if int(8 * rng.random()) > 0:
            assert mixed[epoch, 0]["label"] == rows["label"][0]
            assert torch.equal(mixed[epoch, 0]["images"], plain[epoch, 0]["images"])
    assert isinstance(mixed[0, 1], Broken)


def test_batches_hold_soft_labels_as_float32(rows):
    dataset = make_train(rows, cutmix=1.0)
    items = [dataset[0, index] for index in range(8)]
    label = collate(items)["label"]
    assert label.dtype == torch.float32 and ((label > 0) & (label < 1)).any()
    np.testing.assert_allclose(label, [item["label"] for item in items], rtol=1e-6)


def test_views_that_share_their_pixels_before_do_not_share_the_box_of_another_view(rows):
    """Without a distortion, two views are one array; the box of one must not land in the other."""
    policy = DistortionPolicy(probability=0.5, distort_at="input")
    plain = make_train(rows, policy, views=("clean",))
    mixed = make_train(rows, policy, views=("clean",), cutmix=1.0)
    for epoch in range(4):
        for index in range(8):
            rng = training_generator(3, 1, epoch, index, 3)
            rng.random()
            other, box = int(8 * rng.random()), draw_box(SIZE, 1.0, rng)
            inside = (slice(None), slice(box.top, box.bottom), slice(box.left, box.right))
            for view in ("images", "images_clean"):
                found = mixed[epoch, index][view]
                assert torch.equal(found[inside], plain[epoch, other][view][inside])
