"""AugMix: its operations against Pillow's, which the authors use, the mixture against NumPy, determinism."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image, ImageOps
from test_dataset import PREPROCESSING, make_train

from featdistill.data import augmix as module
from featdistill.data.augmix import MOVES, TONES, augmix
from featdistill.data.preprocessing import to_planes
from featdistill.distortions.policy import DistortionPolicy
from featdistill.distortions.presets import PRESETS
from featdistill.records.manifest import read_manifest
from featdistill.seeds import training_generator


def affine(picture, *values):
    return picture.transform(picture.size, Image.Transform.AFFINE, values, Image.Resampling.BILINEAR)


# By the authors' code; a strength of 1 is their level 10.
AUTHORS = {
    "autocontrast": lambda picture, strength: ImageOps.autocontrast(picture),
    "equalize": lambda picture, strength: ImageOps.equalize(picture),
    "posterize": lambda picture, strength: ImageOps.posterize(picture, 4 - int(abs(strength) * 4)),
    "solarize": lambda picture, strength: ImageOps.solarize(picture, 256 - int(abs(strength) * 256)),
    "rotate": lambda picture, strength: picture.rotate(int(strength * 30), Image.Resampling.BILINEAR),
    "shear_x": lambda picture, strength: affine(picture, 1, strength * 0.3, 0, 0, 1, 0),
    "shear_y": lambda picture, strength: affine(picture, 1, 0, 0, strength * 0.3, 1, 0),
    "translate_x": lambda picture, strength: affine(
        picture, 1, 0, int(strength * picture.width / 3), 0, 1, 0
    ),
    "translate_y": lambda picture, strength: affine(
        picture, 1, 0, 0, 0, 1, int(strength * picture.height / 3)
    ),
}


@pytest.mark.parametrize("name", [*TONES, *MOVES])
@pytest.mark.parametrize("strength", [-0.63, 0.1, 0.95])
def test_operations_are_those_of_the_authors(name, strength):
    image = smooth_picture(2, 60, 84) // 2 + 40
    found = (TONES | MOVES)[name](image, strength)
    expected = np.asarray(AUTHORS[name](Image.fromarray(image), strength))
    assert found.dtype == np.uint8 and found.shape == image.shape and found is not image
    difference = np.abs(found.astype(int) - expected)
    if name in ("rotate", "shear_x", "shear_y"):
        # Pillow and OpenCV interpolate with other roundings, and draw the border differently.
        assert np.percentile(difference, 95) <= 2 and (difference > 40).mean() < 0.03
    else:
        assert difference.max() == 0
    assert np.array_equal(image, smooth_picture(2, 60, 84) // 2 + 40)


def test_flat_and_tiny_images_pass_all_operations():
    for shape in ((1, 1, 3), (5, 2, 3)):
        for value in (0, 128, 255):
            flat = np.full(shape, value, np.uint8)
            for name in ("autocontrast", "equalize"):
                assert np.array_equal(TONES[name](flat, 0.5), flat)
            assert augmix(flat, np.random.default_rng(0), severity=10).shape == shape


def by_formula(image, rng, severity, width, depth, operations):
    """Algorithm 1 of the paper in float64, with the same draws."""
    weights, share = rng.dirichlet([1] * width), rng.beta(1, 1)
    mixed = np.zeros(image.shape)
    for weight in weights:
        chain = image
        for _ in range(depth or rng.integers(1, 4)):
            name = operations[rng.integers(len(operations))]
            strength = rng.uniform(0.1, severity) / 10 * (1 if rng.random() < 0.5 else -1)
            chain = (TONES | MOVES)[name](chain, strength)
        mixed += weight * chain
    return (1 - share) * image + share * mixed


@pytest.mark.parametrize(("severity", "width", "depth"), [(3, 3, 0), (6, 3, 1), (10, 1, 2)])
@pytest.mark.parametrize("keeps_layout_only", [False, True])
def test_the_result_is_the_convex_mixture_of_the_paper(severity, width, depth, keeps_layout_only):
    image = smooth_picture(5, 48, 40)
    names = [*TONES, *([] if keeps_layout_only else MOVES)]
    for seed in range(8):
        settings = {"severity": severity, "width": width, "depth": depth}
        rng = np.random.default_rng(seed)
        found = augmix(image, rng, **settings, keeps_layout_only=keeps_layout_only)
        again = np.random.default_rng(seed)
        expected = by_formula(image, again, severity, width, depth, names)
        assert found.dtype == np.uint8
        np.testing.assert_allclose(found, expected, atol=0.51)
        assert rng.random() == again.random()


def test_a_mixture_of_unchanged_copies_is_the_image(monkeypatch):
    monkeypatch.setattr(module, "TONES", {"same": lambda image, strength: image.copy()})
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for seed in range(20):
        found = augmix(image, np.random.default_rng(seed), keeps_layout_only=True)
        assert np.array_equal(found, image)


def test_training_images_are_mixed_as_a_function_of_seed_stage_epoch_and_index(make_set):
    manifest, options = make_set("train", 6), {"augmix": 1.0, "augmix_severity": 6.0, "augmix_depth": 1}
    plain, mixed = make_train(manifest), make_train(manifest, **options)
    again = make_train(manifest, **options)
    _ = [again[0, index] for index in (5, 1)]
    for item in ((0, 2), (1, 2), (0, 3)):
        rng = training_generator(3, 1, *item, 2)
        assert rng.random() < 1
        before = plain[item]["images"].numpy().transpose(1, 2, 0)
        expected = augmix(np.ascontiguousarray(before), rng, severity=6.0, depth=1)
        assert torch.equal(mixed[item]["images"], to_planes(expected))
        assert torch.equal(mixed[item]["images"], again[item]["images"])
    other_stage = make_train(manifest, stage=2, **options)
    assert not torch.equal(other_stage[0, 2]["images"], mixed[0, 2]["images"])


def test_clean_views_are_not_mixed_and_others_each_in_their_own_way(make_set):
    manifest = make_set("train", 6)
    policy = DistortionPolicy(probability=0.0)
    dataset = make_train(manifest, policy, augmix=1.0, views=("clean", "other"), other_crop="same")
    plain = make_train(manifest, policy, views=("clean",))
    item = dataset[0, 1]
    assert torch.equal(item["images_clean"], plain[0, 1]["images_clean"])
    pairs = (("images", "images_clean"), ("images_other", "images_clean"), ("images", "images_other"))
    for one, other in pairs:
        assert not torch.equal(item[one], item[other])
    # Switching another view on does not change this one.
    assert torch.equal(make_train(manifest, policy, augmix=1.0)[0, 1]["images"], item["images"])


def test_pixels_stay_in_place_where_the_policy_says_so(make_set):
    manifest, size = make_set("train", 8), PREPROCESSING.size
    policy = dataclasses.replace(PRESETS["none"], keeps_layout_only=True)
    dataset = make_train(manifest, policy, augmix=1.0, augmix_severity=10.0, views=("clean",))
    for index in range(8):
        item = dataset[0, index]
        # A tone operation is a function of the value, so equal pixels stay equal.
        for channel in range(3):
            before, after = (item[view][channel].ravel() for view in ("images_clean", "images"))
            for value in before.unique():
                assert len(after[before == value].unique()) == 1
    assert item["images"].shape == (3, size, size)


def test_a_share_of_the_images_is_mixed_and_groups_alike(make_set):
    rows = read_manifest(make_set("train", 6))
    policy = DistortionPolicy(probability=0.0)
    half, plain = make_train(rows, policy, augmix=0.5), make_train(rows, policy)
    changed = [
        not torch.equal(half[epoch, index]["images"], plain[epoch, index]["images"])
        for epoch in range(20)
        for index in range(6)
    ]
    assert 0.3 < np.mean(changed) < 0.65
    rows = rows.assign(group=["a", "a", "", "", "", ""], image=rows["image"][0])
    grouped = make_train(rows, policy, augmix=1.0, synchronize_groups=True)
    assert torch.equal(grouped[0, 0]["images"], grouped[0, 1]["images"])
    assert not torch.equal(grouped[0, 0]["images"], grouped[0, 2]["images"])
