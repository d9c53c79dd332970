"""Processor time of the calling thread: of one call, of a function on several images, and the yardstick.

Threads that a codec starts itself are not counted; of the codecs used here, only AVIF's decoder has any.
"""

import io
import statistics
import time
import timeit
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from benchmarks.scenes import fitted

# Slow functions get fewer runs than requested: as many as take about this long, but at least one per image.
BUDGET_S = 0.5


def thread_s(call: Callable[[], object]) -> float:
    """Return the processor time that the calling thread spends in a call, in seconds."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def typical_ms(function: Callable[[np.ndarray], object], images: list[np.ndarray], repeats: int) -> float:
    """Return the mean over the images of the median time of `function(image)`, in milliseconds.

    Every image gets `repeats` runs, or fewer (see `BUDGET_S`). A first run, which builds tables and allocates
    memory, is not counted.
    """
    function(images[0])
    once_s = thread_s(lambda: function(images[0]))
    runs = max(1, min(repeats, int(BUDGET_S / len(images) / max(once_s, 1e-6))))
    medians_s = [
        statistics.median(
            timeit.repeat(partial(function, image), number=1, repeat=runs, timer=time.thread_time)
        )
        for image in images
    ]
    return 1000 * statistics.fmean(medians_s)


class Yardstick:
    """Y: Pillow decodes a JPEG of 0.66 megapixels (quality 90, 4:2:0) and resizes its shorter side to 384.

    It is measured between the other measurements, since the machine may slow down meanwhile.
    """

    def __init__(self, scene: np.ndarray, repeats: int = 7) -> None:
        """Make the JPEG from a scene; a measurement is the median of `repeats` runs."""
        file = io.BytesIO()
        Image.fromarray(fitted(scene, (940, 704))).save(file, "JPEG", quality=90)
        self._data, self._repeats = file.getvalue(), repeats
        self._measured_ms: list[float] = []

    def measure(self) -> None:
        """Measure once more."""
        self._measured_ms.append(typical_ms(self._decode_and_resize, [self._data], self._repeats))

    def report(self) -> dict:
        """Return `yardstick_ms`, the median of all measurements, and the measurements."""
        return {"yardstick_ms": statistics.median(self._measured_ms), "measurements_ms": self._measured_ms}

    @staticmethod
    def _decode_and_resize(data: bytes) -> None:
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB").resize((round(940 * 384 / 704), 384), Image.Resampling.BICUBIC)
