"""Runs on mixed images (AugMix, CutMix), whose labels are between 0 and 1."""

import math

import pytest
from training_runs import SMALL, SMALL_STAGE_2, lines, losses, weights

import distill
import train

MIXED = ["--augmix", "0.5", "--augmix-severity", "6", "--augmix-depth", "1", "--cutmix", "1", "--epochs", "1"]


def test_a_run_on_mixed_images_is_repeated_bit_for_bit(sets, tmp_path):
    for name in ("one", "two"):
        train.main([*SMALL, *sets, *MIXED, "--focal-gamma", "2", "--out", str(tmp_path / name)])
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    train.main([*SMALL, *sets, "--epochs", "1", "--focal-gamma", "2", "--out", str(tmp_path / "plain")])
    assert losses(tmp_path / "one") != losses(tmp_path / "plain")


@pytest.mark.parametrize("objective", ["dense", "dense+crd"])
def test_stage_2_learns_from_mixed_images(objective, sets, tmp_path):
    train.main([*SMALL, *sets, "--epochs", "1", "--out", str(tmp_path / "one")])
    own = ["--teacher", str(tmp_path / "one" / "expert"), "--objective", objective]
    own += ["--crd-queue", "24", "--crd-negatives", "other_label"]
    distill.main([*SMALL_STAGE_2, *sets, *MIXED, *own, "--out", str(tmp_path / "two")])
    first = lines(tmp_path / "two")[0]
    assert {"bce", "dense"} <= first.keys() and ("crd" in first) == ("crd" in objective)
    assert all(math.isfinite(loss) for _, loss in losses(tmp_path / "two"))
