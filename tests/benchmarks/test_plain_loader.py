"""The plain loader of the benchmark does the same work as ours: its operations agree with ours."""

import numpy as np
import pytest

from benchmarks.plain_loader import OPERATIONS
from benchmarks.scenes import synthetic_scene
from featdistill.distortions.official import OFFICIAL
from featdistill.distortions.operation import LEVELS


@pytest.mark.parametrize("name", [name for name, operation in OFFICIAL.items() if not operation.random])
def test_an_operation_of_the_plain_loader_agrees_with_ours_within_half_a_step(name):
    scene, rng, operation = synthetic_scene(0), np.random.default_rng(0), OFFICIAL[name]
    for level, scale in zip(LEVELS, operation.scales, strict=True):
        plain = OPERATIONS[name](scene.astype(np.float32) / 255, scale, rng)
        assert np.abs(operation(scene, level, rng) - 255 * np.clip(plain, 0, 1)).mean() < 0.5
