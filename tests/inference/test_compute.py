"""Which precision and how many workers a run gets, and where its time went."""

import time

import pytest
import torch
from torch import nn

from featdistill.inference import compute, predictor
from featdistill.inference.profile import COMPUTING, DEVICE, IMAGES, Profile

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def layers(width: int) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(3, 9000, 40), nn.Linear(width, 1000), nn.Linear(width, 1000))


@pytest.mark.parametrize(
    ("multiplies", "widths", "expected"),
    [
        (True, [5000], "bf16"),
        (True, [5000, 8000], "bf16"),
        (True, [4999, 8000], "fp32"),
        (True, [], "fp32"),
        (False, [8000], "fp32"),
    ],
)
def test_large_experts_compute_in_bf16_where_the_processor_does(monkeypatch, multiplies, widths, expected):
    monkeypatch.setattr(compute, "multiplies_bfloat16", lambda: multiplies)
    experts = [layers(width) for width in widths]
    assert compute.choose_precision(None, CPU, experts) == expected
    assert compute.choose_precision("fp32", CPU, experts) == "fp32"
    assert compute.choose_precision(None, GPU, experts) == "bf16"


@pytest.mark.parametrize(
    ("cores", "world", "with_gpu", "without"), [(16, 1, 16, 8), (64, 8, 8, 8), (96, 1, 32, 8)]
)
def test_a_gpu_gets_more_workers(monkeypatch, cores, world, with_gpu, without):
    monkeypatch.setattr(predictor.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    assert (predictor.default_workers(GPU), predictor.default_workers(CPU)) == (with_gpu, without)


def test_a_profile_adds_up_to_the_time_of_a_run():
    profile = Profile()

    def slow():
        for number in range(3):
            time.sleep(0.03)
            yield number

    for _ in profile.waited(slow()):
        with profile.part(COMPUTING):
            time.sleep(0.06)
    assert 0.09 <= profile.seconds[IMAGES] < profile.seconds[COMPUTING]
    assert profile.seconds[DEVICE] == 0
    line = profile.line()
    assert IMAGES in line and COMPUTING in line and DEVICE not in line and line.endswith("for the rest")
