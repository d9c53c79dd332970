"""Views that look alike are made once, and items are the same as if each view was made by itself."""

from collections import Counter

import pytest
import torch
from test_dataset import PREPROCESSING

from featdistill.data import train_dataset
from featdistill.data.preprocessing import fit
from featdistill.data.train_dataset import TrainDataset
from featdistill.distortions.presets import parse_policy
from featdistill.recipe_groups import Augmentation
from featdistill.records.manifest import read_manifest

MIXES = {"augmix": 0.5, "cutmix": 0.5, "amplitude_mixup": 0.5}


class Separate(TrainDataset):
    """Makes every view by itself."""

    def squares(self, image, plans, places, side=None):
        made = {}
        for view, plan in plans.items():
            made |= super().squares(image.copy(), {view: plan}, places, side)
        return made

    def _mix(self, squares, epoch, index, places):
        for view, place in places.items():
            super()._mix(squares, epoch, index, {view: place})


def both(rows, policy: str, views: tuple[str, ...], inputs: dict, **augmentation) -> list[TrainDataset]:
    options = {"stage": 2, "views": views, "inputs": inputs}
    return [
        kind(rows, PREPROCESSING, parse_policy(policy), 3, Augmentation(**augmentation), **options)
        for kind in (TrainDataset, Separate)
    ]


@pytest.mark.parametrize("at", ["native", "input"])
@pytest.mark.parametrize(
    ("views", "inputs", "augmentation"),
    [
        (("clean",), {}, {}),
        (("clean", "other"), {}, MIXES | {"crop": "random_resized"}),
        (("clean", "other"), {}, MIXES | {"other_crop": "same"}),
        (
            ("clean",),
            {"images_clean": [(40, "squash")], "images": [(40, "squash")]},
            {"amplitude_mixup": 0.5},
        ),
    ],
)
def test_items_are_those_of_views_that_are_made_separately(make_set, at, views, inputs, augmentation):
    if inputs and at == "input":
        pytest.skip("teachers with other inputs need distort_at=native")
    policy = f"official,probability=0.4,distort_at={at}"
    shared, separate = both(read_manifest(make_set("train", 8)), policy, views, inputs, **augmentation)
    alike = Counter()
    for epoch in range(12):
        for index in range(8):
            item, wanted = shared[epoch, index], separate[epoch, index]
            assert item.keys() == wanted.keys() and item["label"] == wanted["label"]
            for name in shared.sides_px:
                assert torch.equal(item[name], wanted[name]), (epoch, index, name)
            alike[torch.equal(item["images"], item["images_clean"])] += 1
    assert min(alike[True], alike[False]) > 5


def test_an_image_that_is_not_distorted_is_fitted_once(make_set, monkeypatch):
    shared, separate = both(read_manifest(make_set("train", 2)), "none", ("clean",), {})
    calls = []
    monkeypatch.setattr(
        train_dataset, "fit", lambda *arguments, **place: calls.append(1) or fit(*arguments, **place)
    )
    for dataset, count in ((shared, 1), (separate, 2)):
        calls.clear()
        _ = dataset[0, 1]
        assert len(calls) == count
