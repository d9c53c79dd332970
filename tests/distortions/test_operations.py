"""The contract that every operation of every distortion library is held to."""

import hashlib
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import smooth_picture
from hypothesis import given, settings
from hypothesis import strategies as st

from featdistill.distortions.kernels import scratch
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import LEVELS

ROOT = Path(__file__).resolve().parents[2]
EVERY = [
    pytest.param(operation, id=f"{library}-{operation.name}")
    for library, operations in LIBRARIES.items()
    for operation in operations.values()
    if not operation.missing()
]
SIZES = [(16, 16), (17, 233), (300, 400)]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other.astype(int))


@pytest.mark.parametrize("operation", EVERY)
def test_the_result_is_a_new_image_of_the_same_kind_and_the_input_stays(operation):
    for height, width in SIZES:
        image = smooth_picture(1, height, width)
        before = image.copy()
        for level in LEVELS if height < 300 else (3, 5):
            result = operation(image, level, generator())
            assert result.dtype == np.uint8 and result.ndim == 3 and result.shape[2] == 3
            assert result.shape == image.shape or not operation.keeps_size
            assert not np.shares_memory(result, image)
            np.testing.assert_array_equal(image, before)
            np.testing.assert_array_equal(result, operation(image, level, generator()))


@pytest.mark.parametrize("operation", EVERY)
def test_views_give_what_their_copies_give(operation):
    whole = smooth_picture(3, 80, 90)
    for view in (
        whole[::2, ::2],
        whole[:, ::-1],
        whole[..., ::-1],
        whole.transpose(1, 0, 2),
        whole[5:40, 7:60],
    ):
        for level in (1, 5):
            expected = operation(np.ascontiguousarray(view), level, generator())
            np.testing.assert_array_equal(operation(view, level, generator()), expected)


@pytest.mark.parametrize("operation", EVERY)
def test_the_seed_matters_where_the_operation_is_random_and_nowhere_else(operation):
    image = smooth_picture(4, 64, 64)
    for level in LEVELS:
        results = {operation(image, level, generator(seed)).tobytes() for seed in range(4)}
        assert (len(results) > 1) == operation.random


@pytest.mark.parametrize("operation", [p for p in EVERY if p.values[0].monotone and p.values[0].keeps_size])
def test_a_higher_level_changes_the_image_more(operation):
    images = [smooth_picture(seed, 96, 112) for seed in range(3)]
    changes = [
        np.mean(
            [
                difference(operation(image, level, generator(seed)), image)
                for image in images
                for seed in range(4 if operation.random else 1)
            ]
        )
        for level in LEVELS
    ]
    assert changes[0] >= 0 and all(lower < higher for lower, higher in pairwise(changes))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    operation=st.sampled_from([p.values[0] for p in EVERY]),
    level=st.sampled_from(LEVELS),
    height=st.integers(16, 90),
    width=st.integers(16, 90),
    seed=st.integers(0, 2**32),
)
def test_any_size_from_16_px_is_served(operation, level, height, width, seed):
    image = generator(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    result = operation(image, level, generator(seed))
    assert result.dtype == np.uint8 and (result.shape == image.shape or not operation.keeps_size)


@pytest.mark.parametrize("operation", EVERY)
def test_a_flat_image_is_served(operation):
    for value in (0, 255, 7):
        image = np.full((20, 24, 3), value, np.uint8)
        for level in LEVELS:
            assert operation(image, level, generator()).dtype == np.uint8


@pytest.mark.parametrize("operation", EVERY)
def test_wrong_input_is_a_value_error_that_names_the_operation(operation):
    image = smooth_picture(5, 32, 32)
    wrong = [
        image[..., 0],
        np.dstack([image, image[..., :1]]),
        image / 255,
        image.astype(np.int16),
        np.zeros((0, 0, 3), np.uint8),
        image[:15],
        image.tolist(),
    ]
    for bad in wrong:
        with pytest.raises(ValueError, match=operation.name):
            operation(bad, 1, generator())
    for level in (0, 6):
        with pytest.raises(ValueError, match=operation.name):
            operation(image, level, generator())


def test_no_global_generator_is_drawn_from():
    image = smooth_picture(6, 40, 40)
    cv2.setRNGSeed(5)
    expected = cv2.randu(np.empty((4, 4), np.uint8), 0, 256).copy()
    cv2.setRNGSeed(5)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    for parameter in EVERY:
        for level in LEVELS:
            parameter.values[0](image, level, generator())
    assert random.getstate() == python
    after = np.random.get_state()  # noqa: NPY002
    assert after[2] == numpy[2] and np.array_equal(after[1], numpy[1])
    np.testing.assert_array_equal(cv2.randu(np.empty((4, 4), np.uint8), 0, 256), expected)


@pytest.mark.parametrize("operation", EVERY)
def test_threads_do_not_disturb_one_another(operation):
    images = [smooth_picture(seed, 60 + 20 * seed, 150 - 20 * seed) for seed in range(4)] * 3
    expected = [operation(image, 4, generator()) for image in images]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda image: operation(image, 4, generator()), images))
    for result, one in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, one)


def at_offset(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy that begins so many bytes behind a multiple of 64."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    first = -memory.ctypes.data % 64 + offset
    copy = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.fixture
def scratch_at(monkeypatch):
    """Return a function that sets the address of scratch memory, in bytes after a multiple of 64."""

    users = [
        module
        for module in sys.modules.values()
        if getattr(module, "scratch_array", None) is scratch.scratch_array
    ]

    def place(offset: int) -> None:
        def scratch_array(_, shape, dtype):
            return at_offset(np.zeros(shape, dtype), offset)

        for module in users:
            monkeypatch.setattr(module, "scratch_array", scratch_array)

    return place


# Some kernels of OpenCV round otherwise by alignment, and which alignment there is changes from run to run.
OFFSETS = (0, 4, 16, 48)


@pytest.mark.parametrize("operation", EVERY)
def test_where_arrays_lie_in_memory_does_not_change_the_result(operation, scratch_at):
    image = smooth_picture(7, 112, 176)
    for level in LEVELS:
        found = []
        for offset in OFFSETS:
            scratch_at(offset)
            found.append(operation(at_offset(image, offset), level, generator()))
        assert all(np.array_equal(one, found[0]) for one in found)


@pytest.mark.parametrize("operation", EVERY)
def test_the_number_of_threads_does_not_change_the_result(operation):
    image, before = smooth_picture(8, 320, 300), cv2.getNumThreads()
    try:
        for level in LEVELS:
            found = []
            for threads in (0, 5):
                cv2.setNumThreads(threads)
                found.append(operation(image, level, generator()))
            assert all(np.array_equal(one, found[0]) for one in found)
    finally:
        cv2.setNumThreads(before)


def test_another_process_gives_the_same_bytes():
    program = (
        "import cv2, sys; sys.path[:0] = ['tests', 'tests/distortions']; cv2.setNumThreads(1)\n"
        "from test_operations import digests\n"
        "print('\\n'.join(digests()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == digests()


def digests() -> list[str]:
    """The SHA-256 of what every operation makes of one image at three levels."""
    image = smooth_picture(9, 90, 80)
    return [
        hashlib.sha256(parameter.values[0](image, level, generator(level)).tobytes()).hexdigest()
        for parameter in EVERY
        for level in (1, 3, 5)
    ]
