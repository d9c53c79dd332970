import dataclasses

import cv2
import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image

from data_prep import equalise as equalise_command
from featdistill.command_line import UserError
from featdistill.dataset import (
    Broken,
    Place,
    Preprocessing,
    ScoreDataset,
    TrainBatches,
    TrainDataset,
    collate,
    make_loader,
    prepare,
)
from featdistill.distortion_policy import (
    DistortionPolicy,
    apply_plan,
    evaluation_generator,
    training_generator,
)
from featdistill.distortion_presets import PRESETS
from featdistill.equalise import read_settings
from featdistill.image_io import read_image
from featdistill.manifest import read_manifest

PREPROCESSING = Preprocessing(48, "shorter", (0.5,) * 3, (0.5,) * 3)


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
    middle, end = (as_image(prepare(picture, 48, "shorter", place)) for place in (Place(), Place(1, 1)))
    assert middle.shape == end.shape == (48, 48, 3)
    assert 126 <= middle.mean() <= 129
    if width > height:
        assert end.mean() > 250


def test_a_place_moves_the_crop_and_mirrors_it():
    picture = smooth_picture(3, 50, 70)
    np.testing.assert_array_equal(as_image(prepare(picture, 40, "crop", Place(0, 0))), picture[:40, :40])
    found = as_image(prepare(picture, 40, "crop", Place(0.99, 0.99, True)))
    np.testing.assert_array_equal(found, picture[9:49, 29:69][:, ::-1])


def make_train(manifest, *, policy=PRESETS["heavy"], seed=3, **options) -> TrainDataset:
    return TrainDataset(read_manifest(manifest), PREPROCESSING, policy, seed, **options)


def test_what_happens_to_an_image_is_a_function_of_seed_epoch_and_index(make_set):
    manifest = make_set("train", 6)
    first, again = make_train(manifest), make_train(manifest)
    _ = [again[0, index] for index in (5, 1)]
    assert torch.equal(first[0, 2]["images"], again[0, 2]["images"])
    assert not torch.equal(first[0, 2]["images"], first[1, 2]["images"])
    assert not torch.equal(first[0, 2]["images"], make_train(manifest, seed=4)[0, 2]["images"])


def test_the_teachers_view_shares_crop_and_flip_with_the_students(make_set):
    manifest = make_set("train", 4)
    none = DistortionPolicy(probability=0)
    undistorted = make_train(manifest, policy=none, teacher_view="clean")
    for epoch in range(4):
        item = undistorted[epoch, 1]
        assert torch.equal(item["images"], item["teacher_images"])
        clean = make_train(manifest, teacher_view="clean")[epoch, 1]
        assert torch.equal(clean["teacher_images"], item["images"])
        same = make_train(manifest, teacher_view="same")[epoch, 1]
        assert torch.equal(same["images"], same["teacher_images"])
        assert torch.equal(same["images"], clean["images"])
        other = make_train(manifest, teacher_view="other")[epoch, 1]
        assert torch.equal(other["images"], clean["images"])
        assert not torch.equal(other["teacher_images"], other["images"])
        assert not torch.equal(other["teacher_images"], clean["teacher_images"])


def test_distorting_at_the_input_distorts_the_prepared_pixels(make_set):
    manifest = make_set("train", 4)
    policy = DistortionPolicy(include=("quantization",), max_operations=1, level_mean=5, level_std=0.01)
    plain = make_train(manifest, policy=DistortionPolicy(probability=0))[0, 0]["images"]
    at_input = make_train(manifest, policy=dataclasses.replace(policy, distort_at="input"))[0, 0]["images"]
    at_native = make_train(manifest, policy=policy)[0, 0]["images"]
    # Eight levels at the input (7 steps, and 0 for itself); resizing after the distortion blends them.
    assert len(torch.unique(at_input)) <= 8 < len(torch.unique(at_native))
    assert not torch.equal(plain, at_input)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_do_not_depend_on_the_number_of_workers(make_set, workers):
    dataset = make_train(make_set("train", 10), teacher_view="other")
    batches = TrainBatches(10, 4, 2, seed=1)
    expected = [collate([dataset[item] for item in items]) for items in batches]
    state = torch.get_rng_state()
    found = list(make_loader(dataset, batches, workers))
    assert torch.equal(state, torch.get_rng_state())
    assert len(found) == len(expected) == len(batches) == 4
    for one, other in zip(found, expected, strict=True):
        assert sorted(one) == ["broken", "images", "index", "label", "teacher_images"]
        assert all(torch.equal(one[key], other[key]) for key in one if key != "broken")


def indices(**options) -> list[list[tuple[int, int]]]:
    return list(TrainBatches(26, 8, 2, seed=5, **options))


def test_every_epoch_is_another_permutation_without_repeats():
    flat = [item for batch in indices() for item in batch]
    assert len(flat) == len(set(flat)) == 48
    epochs = [[index for epoch, index in flat if epoch == wanted] for wanted in (0, 1)]
    assert epochs[0] != epochs[1] and all(0 <= index < 26 for index in epochs[0])


def test_a_step_sees_the_same_images_over_processes_and_accumulation():
    whole = indices()
    for world, accumulation in ((2, 1), (1, 4), (2, 2)):
        ranks = [indices(world=world, accumulation=accumulation, rank=rank) for rank in range(world)]
        for step, expected in enumerate(whole):
            parts = [
                item
                for part in range(step * accumulation, (step + 1) * accumulation)
                for rank in ranks
                for item in rank[part]
            ]
            assert parts == expected


def test_a_resumed_stream_is_the_rest_of_the_whole_one():
    assert indices(start=3) == indices()[3:]
    assert indices(start=2, accumulation=2) == indices(accumulation=2)[4:]


def test_batches_that_cannot_be_made_are_an_error():
    with pytest.raises(UserError, match="fewer than one batch of 8"):
        TrainBatches(7, 8, 1, 0)
    with pytest.raises(UserError, match="no multiple of 3 processes"):
        TrainBatches(70, 8, 1, 0, world=3)


def test_an_image_is_scored_in_every_size_that_is_asked_for_from_one_decode(make_set):
    rows = read_manifest(make_set("val", 3))
    item = ScoreDataset(rows, [(48, "shorter"), (32, "squash"), (48, "shorter")])[1]
    picture = read_image(rows["image"][1])
    assert list(item["images"]) == [(48, "shorter"), (32, "squash")]
    assert torch.equal(item["images"][32, "squash"], prepare(picture, 32, "squash"))


def test_evaluation_distortions_are_a_function_of_seed_and_name(make_set):
    rows = read_manifest(make_set("val", 4))
    policy = PRESETS["heavy"]
    plan = policy.draw(evaluation_generator(0, rows["name"][2]))
    expected = prepare(apply_plan(read_image(rows["image"][2]), plan), 48, "shorter")
    reversed_rows = rows.iloc[::-1].reset_index(drop=True)
    assert torch.equal(ScoreDataset(rows, [(48, "shorter")], policy)[2]["images"][48, "shorter"], expected)
    assert torch.equal(
        ScoreDataset(reversed_rows, [(48, "shorter")], policy)[1]["images"][48, "shorter"], expected
    )


def test_a_broken_image_is_named_and_leaves_its_batch(make_set):
    manifest = make_set("train", 4)
    rows = read_manifest(manifest)
    path = manifest.parent / rows["name"][1]
    path.write_bytes(path.read_bytes()[:300])
    dataset = make_train(manifest)
    assert isinstance(dataset[0, 1], Broken)
    batch = collate([dataset[0, index] for index in (0, 1, 3)])
    assert batch["index"].tolist() == [0, 3] and batch["images"].shape == (2, 3, 48, 48)
    assert [row.index for row in batch["broken"]] == [1] and batch["broken"][0].reason
    assert list(collate([dataset[0, 1]])) == ["broken"]


def test_a_limit_on_the_longer_side_comes_before_the_distortion_and_for_clean_images_too(make_set):
    manifest = make_set("train", 4)
    for probability in (0.0, 1.0):
        policy = dataclasses.replace(PRESETS["heavy"], probability=probability, max_side_px=44)
        item = make_train(manifest, policy=policy, crop="center", flip=0.0)[0, 1]
        rng = training_generator(3, 0, 1)
        rng.random(3)
        plan = policy.draw(rng)
        image = read_image(read_manifest(manifest)["image"][1])
        image = cv2.resize(image, (44, 36), interpolation=cv2.INTER_AREA)
        assert bool(plan) == bool(probability)
        assert torch.equal(item["images"], prepare(apply_plan(image, plan), *PREPROCESSING.key))


def test_distortions_that_change_the_size_are_fitted_to_the_input_again(make_set):
    policy = DistortionPolicy(
        libraries={"evaluation": 1}, include=("downscale",), max_operations=1, distort_at="input"
    )
    item = make_train(make_set("train", 4), policy=policy)[0, 0]
    assert item["images"].shape == (3, PREPROCESSING.size, PREPROCESSING.size)


def test_an_image_too_small_to_be_distorted_is_broken_and_the_others_go_on(make_set):
    manifest = make_set("train", 4)
    path = read_manifest(manifest)["image"][2]
    Image.fromarray(np.full((9, 30, 3), 90, np.uint8)).save(path)
    batch = collate([make_train(manifest)[0, index] for index in range(4)])
    assert [item.index for item in batch["broken"]] == [2] and len(batch["images"]) == 3
    assert "too small" in batch["broken"][0].reason


def test_equalised_images_are_those_of_the_equalised_copy(make_set, tmp_path):
    manifest = make_set("train", 6)
    assert equalise_command.main([str(manifest), "--out", str(tmp_path / "equal"), "--workers", "1"]) == 0
    settings = read_settings(tmp_path / "equal" / "equalise.json")
    policy = DistortionPolicy(probability=0)
    on_the_fly = make_train(manifest, policy=policy, equalisation=settings)
    stored = make_train(tmp_path / "equal" / "manifest.csv", policy=policy)
    rows, keys = read_manifest(manifest), [PREPROCESSING.key]
    scored = ScoreDataset(rows, keys, equalisation=settings)
    copied = ScoreDataset(read_manifest(tmp_path / "equal" / "manifest.csv"), keys)
    for index in range(6):
        assert torch.equal(on_the_fly[0, index]["images"], stored[0, index]["images"])
        one, other = (data[index]["images"][PREPROCESSING.key] for data in (scored, copied))
        assert torch.equal(one, other)
        assert not torch.equal(one, ScoreDataset(rows, keys)[index]["images"][PREPROCESSING.key])
    with pytest.raises(UserError, match=r"no equalise\.json"):
        read_settings(manifest)


def test_rows_come_up_as_often_as_their_weights_say_and_never_twice_the_same_way():
    weights = np.array([0.25, 0.5, 1, 1, 2, 3.25] * 8)
    stream = TrainBatches(48, 8, 40, seed=3, weights=weights)
    assert stream.steps_per_epoch == 8
    items = [item for batch in stream for item in batch]
    assert len(items) == len(set(items)) == 40 * 64
    counts = np.bincount([index for _, index in items], minlength=48).reshape(8, 6)
    np.testing.assert_allclose(counts.mean(axis=0) / 40, weights[:6], atol=0.1)
    one_epoch = np.bincount([index for batch in list(stream)[:8] for _, index in batch], minlength=48)
    assert np.all(one_epoch >= np.floor(weights)) and np.all(one_epoch <= np.ceil(weights))
    again = TrainBatches(48, 8, 40, seed=3, weights=weights, start=100)
    assert list(again) == list(stream)[100:]


def test_equal_weights_are_no_weights_but_for_the_order(make_set):
    items = [item for batch in TrainBatches(24, 8, 2, seed=0, weights=np.ones(24)) for item in batch]
    assert sorted(items) == [(epoch, index) for epoch in range(2) for index in range(24)]
    rows = read_manifest(make_set("train", 4)).assign(weight=["2", "", "0.5", "1"])
    policy = PRESETS["none"]
    assert TrainDataset(rows, PREPROCESSING, policy, 0).weights.tolist() == [2, 1, 0.5, 1]
    with pytest.raises(UserError, match=r"weight of .* must be a number above 0, not '-1'"):
        TrainDataset(rows.assign(weight="-1"), PREPROCESSING, policy, 0)
