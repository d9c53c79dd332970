"""What the training set adds for other networks: their inputs, numbers of the rows, rows without a label."""

import dataclasses

import numpy as np
import pytest
import torch
from test_dataset import draws, make_train

from featdistill.command_line import UserError
from featdistill.data.preprocessing import prepare
from featdistill.distortions.plan import apply_plan
from featdistill.distortions.presets import PRESETS
from featdistill.images.reading import read_image
from featdistill.records.manifest import read_manifest


@pytest.mark.parametrize("mixes", [False, True])
def test_every_network_gets_its_own_pixels_of_the_same_distorted_image(make_set, monkeypatch, mixes):
    manifest, keys = make_set("train", 4), [(64, "squash"), (40, "shorter", 60)]
    inputs = {"images": keys, "images_clean": keys[:1]}
    options = {"amplitude_mixup": 1.0} if mixes else {}
    options |= {"views": ("clean",)}
    policy = PRESETS["heavy"]
    plain = make_train(manifest, policy, **options)
    applied = []
    monkeypatch.setattr(
        "featdistill.data.train_dataset.apply_plan",
        lambda image, plan: applied.append(plan) or apply_plan(image, plan),
    )
    dataset = make_train(manifest, policy, inputs=inputs, **options)
    item, own = dataset[1, 2], plain[1, 2]
    assert len(applied) == 2 + 2  # each view once
    assert all(torch.equal(item[name], own[name]) for name in ("images", "images_clean"))
    others = ["64-squash@images", "40-shorter-60@images", "64-squash@images_clean"]
    assert dataset.sides_px == {name: item[name].shape[-1] for name in ["images", "images_clean", *others]}
    if mixes:
        unmixed = make_train(manifest, policy, inputs=inputs, **options | {"amplitude_mixup": 0.0})[1, 2]
        assert all(not torch.equal(item[name], unmixed[name]) for name in others)
        return
    place, plan, _, _ = draws(policy, 2, 1)
    image = read_image(read_manifest(manifest)["image"][2])
    for name, key in zip(others, [*keys, keys[0]], strict=True):
        seen = image if "clean" in name else apply_plan(image, plan)
        assert torch.equal(item[name], prepare(seen, *key, place=place))


def test_what_would_show_teachers_another_image_is_refused(make_set):
    manifest, inputs = make_set("train", 4), {"images": [(64, "squash")]}
    policy = dataclasses.replace(PRESETS["heavy"], distort_at="input")
    with pytest.raises(UserError, match="use distort_at=native"):
        make_train(manifest, policy, inputs=inputs)
    for name in ("augmix", "cutmix"):
        with pytest.raises(UserError, match=f"teachers have other inputs; use --{name} 0"):
            make_train(manifest, inputs=inputs, **{name: 0.5})
        make_train(manifest, inputs={"images": []}, **{name: 0.5})
    with pytest.raises(UserError, match="stored scores are of whole images; use --cutmix 0"):
        make_train(manifest, targets=np.zeros(4, np.float32), cutmix=0.5)


def test_rows_without_a_label_and_targets_come_with_their_items(make_set):
    rows = read_manifest(make_set("train", 4))
    rows.loc[[1, 2], "label"] = None
    targets = np.array([0.5, -1, np.nan, 2], np.float32)
    dataset = make_train(rows, targets=targets, amplitude_mixup=1.0)
    items = [dataset[0, index] for index in range(4)]
    np.testing.assert_array_equal([item["label"] for item in items], [0, np.nan, np.nan, 1])
    np.testing.assert_array_equal([item["targets"] for item in items], targets)
    assert {kind: rows.tolist() for kind, rows in dataset.mixup_rows.items()} == {-1: [1, 2], 0: [0], 1: [3]}
