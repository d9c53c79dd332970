"""The official operations agree with their definitions on floats."""

import numpy as np
import pytest
from float_operations import OPERATIONS

from benchmarks.scenes import synthetic_scene
from featdistill.distortions.official import OFFICIAL
from featdistill.distortions.operation import LEVELS


@pytest.mark.parametrize("name", [name for name, operation in OFFICIAL.items() if not operation.random])
def test_an_operation_agrees_with_its_definition_within_half_a_step(name):
    scene, rng, operation = synthetic_scene(0), np.random.default_rng(0), OFFICIAL[name]
    for level, scale in zip(LEVELS, operation.scales, strict=True):
        plain = OPERATIONS[name](scene.astype(np.float32) / 255, scale, rng)
        assert np.abs(operation(scene, level, rng) - 255 * np.clip(plain, 0, 1)).mean() < 0.5
