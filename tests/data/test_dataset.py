import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image

from data_prep import equalize as equalize_command
from featdistill.command_line import UserError
from featdistill.data.amplitude_mixup import mix_amplitudes
from featdistill.data.loading import Broken, ScoreDataset, collate, make_loader
from featdistill.data.preprocessing import Place, Preprocessing, fit, prepare
from featdistill.data.sampling import TrainBatches
from featdistill.data.train_dataset import TrainDataset
from featdistill.data.views import cut_view, parse_tta
from featdistill.distortions.plan import apply_plan
from featdistill.distortions.policy import DistortionPolicy
from featdistill.distortions.presets import PRESETS
from featdistill.images.equalization import read_settings
from featdistill.images.reading import limit_side, read_image
from featdistill.recipe_groups import Augmentation
from featdistill.records.manifest import read_manifest
from featdistill.seeds import evaluation_generator, training_generator

PREPROCESSING = Preprocessing(48, "shorter", (0.5,) * 3, (0.5,) * 3)


def make_train(
    rows, policy=PRESETS["heavy"], *, seed=3, preprocessing=PREPROCESSING, **options
) -> TrainDataset:
    """Return the data set of a manifest or its rows; options are those of the augmentation and of the set."""
    rows = read_manifest(rows) if isinstance(rows, Path) else rows
    own = ("stage", "views", "inputs", "targets", "equalization", "cache", "weights")
    others = {key: options.pop(key) for key in own if key in options}
    return TrainDataset(rows, preprocessing, policy, seed, Augmentation(**options), **others)


def test_what_happens_to_an_image_is_a_function_of_seed_epoch_and_index(make_set):
    manifest = make_set("train", 6)
    first, again = make_train(manifest), make_train(manifest)
    _ = [again[0, index] for index in (5, 1)]
    assert torch.equal(first[0, 2]["images"], again[0, 2]["images"])
    assert not torch.equal(first[0, 2]["images"], first[1, 2]["images"])
    assert not torch.equal(first[0, 2]["images"], make_train(manifest, seed=4)[0, 2]["images"])


@pytest.mark.parametrize(
    ("layout_only", "options"),
    [
        (False, {"views": ("other",)}),
        (True, {"views": ("clean",)}),
        (False, {"synchronize_groups": True, "amplitude_mixup": 0.5, "crop": "random_resized"}),
    ],
)
def test_stage_2_does_not_repeat_the_images_of_stage_1(make_set, layout_only, options):
    policy = dataclasses.replace(PRESETS["released_featdistill"], keeps_layout_only=layout_only)
    rows = read_manifest(make_set("train", 6)).assign(group=["a", "a", "", "", "b", "b"])
    one, two = (make_train(rows, policy, stage=stage, **options) for stage in (1, 2))
    for item in np.ndindex(4, 6):
        assert not torch.equal(one[item]["images"], two[item]["images"])
        assert torch.equal(two[item]["images"], make_train(rows, policy, stage=2, **options)[item]["images"])


def draws(policy, index: int, epoch: int = 0) -> tuple[Place, tuple, tuple, np.random.Generator]:
    """What is drawn for an item in any case, in its order: place, plan, and the plan of the other view."""
    rng = training_generator(3, 1, epoch, index)
    top, left, mirror = rng.random(3)
    return Place(top, left, bool(mirror < 0.5)), policy.draw(rng), policy.draw(rng), rng


def place_of_other(policy, index: int, epoch: int) -> Place:
    top, left, mirror = draws(policy, index, epoch)[3].random(3)
    return Place(top, left, bool(mirror < 0.5))


@pytest.mark.parametrize("distort_at", ["native", "input"])
@pytest.mark.parametrize(("layout_only", "other_crop"), [(False, "own"), (False, "same"), (True, "own")])
def test_views_share_crop_and_flip_except_the_other_one(make_set, distort_at, layout_only, other_crop):
    manifest = make_set("train", 4)
    policy = dataclasses.replace(PRESETS["heavy"], distort_at=distort_at, keeps_layout_only=layout_only)
    has_own = other_crop == "own" and not layout_only
    image = read_image(read_manifest(manifest)["image"][1])

    def view(plan, place):
        if distort_at == "native":
            return prepare(apply_plan(image, plan), *PREPROCESSING.key, place=place)
        return prepare(apply_plan(fit(image, *PREPROCESSING.key, place=place), plan), *PREPROCESSING.key)

    for views in ((), ("clean",), ("other",), ("other", "clean")):
        dataset = make_train(manifest, policy=policy, views=views, other_crop=other_crop)
        for epoch in range(3):
            place, plan, other, _ = draws(policy, 1, epoch)
            item = dataset[epoch, 1]
            extra = [f"images_{view}" for view in views]
            assert sorted(item) == sorted(["epoch", "images", "index", "label", *extra])
            assert (item["epoch"], item["index"]) == (epoch, 1)
            assert torch.equal(item["images"], view(plan, place))
            if "clean" in views:
                assert torch.equal(item["images_clean"], view((), place))
            if "other" in views:
                place = place_of_other(policy, 1, epoch) if has_own else place
                assert torch.equal(item["images_other"], view(other, place))
                assert not torch.equal(item["images_other"], item["images"])
    with pytest.raises(UserError, match="unknown view 'same'"):
        make_train(manifest, views=("same",))


@pytest.mark.parametrize("distort_at", ["native", "input"])
def test_random_resized_crops_are_boxes_of_random_area_and_shape_for_all_views(make_set, distort_at):
    manifest = make_set("train", 4)
    policy = dataclasses.replace(PRESETS["heavy"], distort_at=distort_at)
    options = {"crop": "random_resized", "crop_min_area": 0.3, "views": ("clean", "other")}
    dataset = make_train(manifest, policy=policy, **options)
    image = read_image(read_manifest(manifest)["image"][2])
    areas, logs = [], []
    for epoch in range(40):
        place, plan, plan_of_other, rng = draws(policy, 2, epoch)
        area, log = 1 - 0.7 * (1 - rng.random()), np.log(3 / 4) + 2 * np.log(4 / 3) * rng.random()
        place = place._replace(area=area, aspect=np.exp(log))
        areas.append(area)
        logs.append(log)
        if epoch < 4:
            item = dataset[epoch, 2]
            clean = fit(image, 48, "shorter", place=place)
            assert torch.equal(item["images_clean"], prepare(clean, 48, "crop"))
            if distort_at == "input":
                assert torch.equal(item["images"], prepare(apply_plan(clean, plan), 48, "squash"))
            else:
                assert torch.equal(
                    item["images"], prepare(apply_plan(image, plan), 48, "shorter", place=place)
                )
            # The other view has a box of its own.
            place = Place(*rng.random(2), bool(rng.random() < 0.5))
            area, log = rng.uniform(0.3, 1), rng.uniform(np.log(3 / 4), np.log(4 / 3))
            own = place._replace(area=area, aspect=np.exp(log))
            undistorted = make_train(manifest, DistortionPolicy(probability=0), **options)[epoch, 2]
            assert not torch.equal(undistorted["images_other"], undistorted["images_clean"])
            shared = make_train(manifest, DistortionPolicy(probability=0), other_crop="same", **options)
            assert torch.equal(shared[epoch, 2]["images_other"], shared[epoch, 2]["images_clean"])
            if distort_at == "native":
                expected = prepare(apply_plan(image, plan_of_other), 48, "shorter", place=own)
                assert torch.equal(item["images_other"], expected)
    assert min(areas) < 0.4 and max(areas) > 0.9 and min(logs) < -0.2 and max(logs) > 0.2
    with pytest.raises(UserError, match="random_resized resizes images, and --resize crop does not"):
        make_train(manifest, preprocessing=dataclasses.replace(PREPROCESSING, resize="crop"), **options)


def test_rows_of_a_group_get_the_same_plan_noise_crop_and_mirroring(make_set):
    rows = read_manifest(make_set("train", 6)).assign(group=["x", "x", "", "", "y", "x"])
    for row in (0, 1, 5):  # one picture in three rows
        Image.fromarray(smooth_picture(9)).save(rows["image"][row], quality=95)
    for distort_at in ("native", "input"):
        policy = dataclasses.replace(PRESETS["heavy"], distort_at=distort_at)
        alone = make_train(rows, policy, views=("other",))
        paired = make_train(rows, policy, views=("other",), synchronize_groups=True)
        for epoch in range(3):
            first, second, _, _, last, third = (paired[epoch, index] for index in range(6))
            for view in ("images", "images_other"):
                assert torch.equal(first[view], second[view]) and torch.equal(first[view], third[view])
                assert not torch.equal(alone[epoch, 0][view], alone[epoch, 1][view])
                # Rows without a group keep what they get without the option.
                assert torch.equal(paired[epoch, 2][view], alone[epoch, 2][view])
            assert not torch.equal(paired[epoch + 3, 0]["images"], first["images"])
    # Whatever their number in the manifest.
    moved = make_train(rows.iloc[::-1].reset_index(drop=True), policy, synchronize_groups=True)
    assert torch.equal(moved[2, 1]["images"], last["images"])
    with pytest.raises(UserError, match="no training row has a group"):
        make_train(rows.assign(group=""), synchronize_groups=True)


@pytest.mark.parametrize(("partner", "distort_at"), [("same_label", "native"), ("any", "input")])
def test_amplitude_mixup_is_a_function_of_seed_epoch_and_index_and_the_same_in_all_views(
    make_set, partner, distort_at
):
    manifest = make_set("train", 6)
    policy = dataclasses.replace(PRESETS["heavy"], distort_at=distort_at)
    paths, size = read_manifest(manifest)["image"], PREPROCESSING.key
    options = {"amplitude_mixup": 0.6, "amplitude_mixup_max": 0.8, "amplitude_mixup_with": partner}
    plain = make_train(manifest, policy=policy, views=("clean", "other"))
    mixed = make_train(manifest, policy=policy, views=("clean", "other"), **options)
    done, partners = 0, set()
    for epoch, index in np.ndindex(5, 6):
        one, other = plain[epoch, index], mixed[epoch, index]
        rng = training_generator(3, 1, epoch, index, 1)
        if rng.random() < 0.6:
            share = 0.8 * rng.random()
            rows = [row for row in range(6) if partner == "any" or row % 2 == index % 2]
            row = rows[rng.integers(len(rows))]
            partners.add(row % 2 == index % 2)
            lent = fit(read_image(paths[row]), *size, place=draws(policy, index, epoch)[0])
            for view in ("images", "images_clean", "images_other"):
                if view == "images_other":
                    lent = fit(read_image(paths[row]), *size, place=place_of_other(policy, index, epoch))
                square = mix_amplitudes(one[view].permute(1, 2, 0).numpy(), lent, share)
                assert torch.equal(other[view], prepare(square, *size))
            done += 1
        else:
            assert all(torch.equal(one[view], other[view]) for view in ("images", "images_clean"))
    assert 8 < done < 28 and partners == ({True} if partner == "same_label" else {True, False})


def test_an_item_whose_partner_is_broken_stays_as_it_is(make_set):
    manifest = make_set("train", 4)
    for row in (0, 2):
        Path(read_manifest(manifest)["image"][row]).write_bytes(b"")
    mixed = make_train(manifest, amplitude_mixup=1.0, amplitude_mixup_with="any")
    plain, unmixed = make_train(manifest), 0
    for epoch in range(8):
        is_same = torch.equal(mixed[epoch, 1]["images"], plain[epoch, 1]["images"])
        rng = training_generator(3, 1, epoch, 1, 1)
        rng.random(2)
        assert is_same == (rng.integers(4) in (0, 2))
        unmixed += is_same
    assert 0 < unmixed < 8


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
    dataset = make_train(make_set("train", 10), views=("other",))
    batches = TrainBatches(10, 4, 2, seed=1)
    expected = [collate([dataset[item] for item in items]) for items in batches]
    state = torch.get_rng_state()
    found = list(make_loader(dataset, batches, workers))
    assert torch.equal(state, torch.get_rng_state())
    assert len(found) == len(expected) == len(batches) == 4
    for one, other in zip(found, expected, strict=True):
        assert sorted(one) == ["broken", "epoch", "images", "images_other", "index", "label"]
        assert all(torch.equal(one[key], other[key]) for key in one if key != "broken")


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
        rng = training_generator(3, 1, 0, 1)
        rng.random(3)
        plan = policy.draw(rng)
        image = read_image(read_manifest(manifest)["image"][1])
        image = cv2.resize(image, (44, 36), interpolation=cv2.INTER_AREA)
        assert bool(plan) == bool(probability)
        assert torch.equal(item["images"], prepare(apply_plan(image, plan), *PREPROCESSING.key))


@pytest.mark.parametrize("resize", ["shorter", "squash", "crop"])
def test_an_expert_scores_images_reduced_as_in_its_training(make_set, resize):
    manifest = make_set("train", 4)
    policy = DistortionPolicy(probability=0, max_side_px=44)
    plain = dataclasses.replace(PREPROCESSING, size=32, resize=resize)
    limited = dataclasses.replace(plain, max_side_px=44)
    trained = make_train(manifest, policy, preprocessing=limited, crop="center", flip=0.0)[0, 1]["images"]
    rows, (_, views) = read_manifest(manifest), parse_tta("hflip+five_crop+scales")
    scored = ScoreDataset(rows, [plain.key, limited.key])[1]["images"]
    assert (plain.key, limited.key) == ((32, resize), (32, resize, 44)) == tuple(scored)
    assert torch.equal(scored[limited.key], trained) and not torch.equal(scored[plain.key], trained)
    assert torch.equal(prepare(read_image(rows["image"][1]), *limited.key), trained)
    reduced = limit_side(read_image(rows["image"][1]), 44)
    for view in views:
        seen = ScoreDataset(rows, [limited.key], views=views)[1]["images"][view.key(limited.key)]
        assert torch.equal(seen, cut_view(reduced, *plain.key, view=view))


def test_random_crops_reach_every_position_equally_often(make_set):
    rows = read_manifest(make_set("train", 2))
    ramp = np.zeros((36, 35, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(36)[:, None], np.arange(35)
    path = Path(rows["image"][0]).with_suffix(".png")
    Image.fromarray(ramp).save(path)
    crops = Preprocessing(32, "crop", (0.5,) * 3, (0.5,) * 3)
    policy = DistortionPolicy(probability=0)
    dataset = make_train(rows.assign(image=str(path)), policy, preprocessing=crops, flip=0.0)
    corners = [dataset[epoch, 0]["images"][:2, 0, 0].tolist() for epoch in range(1500)]
    for axis, positions in ((0, 5), (1, 4)):
        counts = np.bincount([corner[axis] for corner in corners], minlength=positions)
        assert len(counts) == positions
        np.testing.assert_allclose(counts / 1500, 1 / positions, atol=0.05)


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


def test_equalized_images_are_those_of_the_equalized_copy(make_set, tmp_path):
    manifest = make_set("train", 6)
    assert equalize_command.main([str(manifest), "--out", str(tmp_path / "equal"), "--workers", "1"]) == 0
    settings = read_settings(tmp_path / "equal" / "equalise.json")
    policy = DistortionPolicy(probability=0)
    on_the_fly = make_train(manifest, policy=policy, equalization=settings)
    stored = make_train(tmp_path / "equal" / "manifest.csv", policy=policy)
    rows, keys = read_manifest(manifest), [PREPROCESSING.key]
    scored = ScoreDataset(rows, keys, equalization=settings)
    copied = ScoreDataset(read_manifest(tmp_path / "equal" / "manifest.csv"), keys)
    for index in range(6):
        assert torch.equal(on_the_fly[0, index]["images"], stored[0, index]["images"])
        one, other = (data[index]["images"][PREPROCESSING.key] for data in (scored, copied))
        assert torch.equal(one, other)
        assert not torch.equal(one, ScoreDataset(rows, keys)[index]["images"][PREPROCESSING.key])
    with pytest.raises(UserError, match=r"was not written by"):
        read_settings(manifest)
