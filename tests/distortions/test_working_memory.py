"""Strips and scratch memory: the same result as at once, and no memory shared between threads."""

import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import smooth_picture

from featdistill.distortions.kernels.scratch import in_strips, scratch_array

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("height,width", [(17, 233), (300, 2000), (1, 90_000)])
def test_strips_give_what_the_whole_image_gives(height, width):
    image = smooth_picture(0, height, width)
    strips = []

    def invert(strip: np.ndarray) -> np.ndarray:
        strips.append(len(strip))
        return 255 - strip

    np.testing.assert_array_equal(in_strips(invert, image), 255 - image)
    assert sum(strips) == height and (len(strips) > 1) == (height * width > 100_000)


def test_strips_overlap_as_far_as_a_filter_reaches():
    image = smooth_picture(1, 700, 900)

    def blur(strip: np.ndarray) -> np.ndarray:
        return cv2.blur(strip, (15, 15), borderType=cv2.BORDER_REPLICATE)

    np.testing.assert_array_equal(in_strips(blur, image, 7), blur(image))
    assert not np.array_equal(in_strips(blur, image, 0), blur(image))


def test_scratch_memory_is_the_same_for_a_name_and_a_thread_and_no_other():
    first = scratch_array("a", (10, 20), np.float32)
    assert np.shares_memory(first, scratch_array("a", (5, 5), np.uint8)) and first.dtype == np.float32
    assert not np.shares_memory(first, scratch_array("b", (10, 20), np.float32))
    others = []
    thread = threading.Thread(target=lambda: others.append(scratch_array("a", (10, 20), np.float32)))
    thread.start()
    thread.join()
    assert not np.shares_memory(first, others[0])


def test_very_large_memory_is_not_reused():
    large = scratch_array("c", (9 << 20,), np.uint8)
    assert not np.shares_memory(large, scratch_array("c", (9 << 20,), np.uint8))


def test_freed_memory_stays_with_the_process_where_the_c_library_can_keep_it():
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not tell how much memory a process has")
    program = """if True:
        import numpy
        from featdistill.process_setup import keep_freed_memory
        def resident_bytes():
            return 4096 * int(open("/proc/self/statm").read().split()[1])
        can_keep, array = keep_freed_memory(), numpy.ones(24 << 20, numpy.uint8)
        with_array = resident_bytes()
        del array
        print(int(can_keep), with_array - resident_bytes())
    """
    command = [sys.executable, "-c", program]
    can_keep, given_back = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split()
    if not int(can_keep):
        pytest.skip("the C library is not glibc")
    assert int(given_back) < 8 << 20
