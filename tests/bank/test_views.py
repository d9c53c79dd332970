"""The views of a bank show what training, evaluation and `predict.py` show, from one decoded image."""

import json

import cv2
import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image

from featdistill.bank import views
from featdistill.bank.views import ViewDataset, ViewPlan, content_only
from featdistill.data.loading import Broken, ScoreDataset, make_loader
from featdistill.data.preprocessing import Preprocessing
from featdistill.data.train_dataset import TrainDataset
from featdistill.distortions.plan import describe
from featdistill.distortions.presets import parse_policy
from featdistill.recipe_groups import Augmentation
from featdistill.records.manifest import make_manifest

HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def rows(tmp_path):
    """Rows of a landscape, a portrait, a long strip, an image that cannot be read, and a small one."""
    sizes = [(70, 90), (120, 65), (20, 400), None, (40, 40)]
    for number, size in enumerate(sizes):
        path = tmp_path / f"{number}.png"
        if size:
            Image.fromarray(smooth_picture(number, *size)).save(path)
        else:
            path.write_bytes(b"not an image")
    names = [f"{number}.png" for number in range(len(sizes))]
    images = [str(tmp_path / name) for name in names]
    return make_manifest({"image": images, "name": names, "label": [0, 1, None, 0, 1]})


def plan(distortions: str, draw: str = "training", **augmentation) -> ViewPlan:
    return ViewPlan(3, draw, 7, Augmentation(distortions=distortions, **augmentation), 16)


@pytest.mark.parametrize("resize", ["shorter", "squash", "crop"])
@pytest.mark.parametrize(
    ("distortions", "augmentation"),
    [
        ("strong", {}),
        ("strong,distort_at=input", {"flip": 1.0}),
        ("official,max_side_px=64", {"crop": "center"}),
        ("none", {"crop": "random", "flip": 0.25}),
    ],
)
def test_training_views_are_those_of_the_first_epochs(rows, distortions, augmentation, resize):
    fitted = Preprocessing(48, resize, HALF, HALF, parse_policy(distortions).max_side_px)
    bank = ViewDataset(rows, fitted, plan(distortions, **augmentation))
    labels = rows.assign(label=[0, 1, 0, 0, 1])
    options = Augmentation(distortions=distortions, **augmentation)
    training = TrainDataset(labels, fitted, parse_policy(distortions), 7, options)
    clean = ScoreDataset(rows, [fitted.key])
    for index in range(len(rows)):
        item = bank[index]
        if index == 3:
            assert item == training[0, index] == clean[index]
            continue
        assert list(item["images"]) == ["clean", "training-1", "training-2", "training-3", "control"]
        assert torch.equal(item["images"]["clean"], clean[index]["images"][fitted.key])
        for epoch in range(3):
            expected = training[epoch, index]["images"]
            assert torch.equal(item["images"][f"training-{epoch + 1}"], expected)
            drawn = json.loads(item["drawn"])
            assert drawn[epoch + 1] == describe(training.draw(epoch, index)[0]["images"])
        assert drawn[0] == drawn[-1] == []


def test_random_resized_crops_are_those_of_training(rows):
    fitted, options = Preprocessing(48, "shorter", HALF, HALF), {"crop": "random_resized"}
    bank = ViewDataset(rows, fitted, plan("official", **options))
    training = TrainDataset(
        rows.assign(label=0), fitted, parse_policy("official"), 7, Augmentation(**options)
    )
    assert torch.equal(bank[1]["images"]["training-3"], training[2, 1]["images"])


@pytest.mark.parametrize("distortions", ["test_public", "strong,max_side_px=64"])
def test_evaluation_views_are_scored_images_with_other_seeds(rows, distortions):
    policy = parse_policy(distortions)
    fitted = Preprocessing(48, "shorter", HALF, HALF, policy.max_side_px)
    bank = ViewDataset(rows, fitted, plan(distortions, "evaluation"))
    for number in range(3):
        scored = ScoreDataset(rows, [fitted.key], policy, 7 + number)
        for index in (0, 1, 4):
            expected = scored[index]["images"][fitted.key]
            assert torch.equal(bank[index]["images"][f"evaluation-{number + 1}"], expected)


def test_an_image_is_decoded_once_for_all_views(rows, monkeypatch):
    calls = []
    load = views.load_image
    monkeypatch.setattr(views, "load_image", lambda *args: calls.append(args) or load(*args))
    ViewDataset(rows, Preprocessing(48, "shorter", HALF, HALF), plan("strong"))[0]
    assert len(calls) == 1


def test_a_batch_has_every_view_and_lists_what_is_broken(rows):
    dataset = ViewDataset(rows, Preprocessing(32, "shorter", HALF, HALF), plan("official"))
    (batch,) = make_loader(dataset, [range(len(rows))], 0)
    assert {values.shape for values in batch["images"].values()} == {(4, 3, 32, 32)}
    assert batch["index"].tolist() == [0, 1, 2, 4] and len(batch["drawn"]) == 4
    assert [item.index for item in batch["broken"]] == [3]


def test_an_image_too_small_to_be_distorted_is_broken_as_in_training(tmp_path):
    Image.fromarray(smooth_picture(0, 9, 9)).save(tmp_path / "small.png")
    rows = make_manifest({"image": [str(tmp_path / "small.png")], "name": ["small.png"], "label": [0]})
    fitted = Preprocessing(32, "shorter", HALF, HALF)
    item = ViewDataset(rows, fitted, plan("official"))[0]
    assert isinstance(item, Broken) and "too small" in item.reason
    assert not isinstance(ViewDataset(rows, fitted, ViewPlan(control_side=8))[0], Broken)


def test_the_control_keeps_the_large_and_loses_the_fine():
    large = np.zeros((96, 96, 3), np.uint8)
    large[:, 48:] = 240
    fine = np.where(np.indices((96, 96)).sum(0)[..., None] % 2, 160, 80).astype(np.uint8).repeat(3, 2)
    assert np.abs(content_only(fine, 16).astype(int) - 120).max() <= 1
    kept = content_only(large, 16).astype(int)
    assert kept[:, :40].max() <= 8 and kept[:, 56:].min() >= 232
    small = cv2.resize(large, (16, 16), interpolation=cv2.INTER_AREA)
    assert np.array_equal(kept, cv2.resize(small, (96, 96), interpolation=cv2.INTER_CUBIC))
