"""Processor time of the calling thread: of a call, of a function on several images, and the yardstick.

What threads of a codec's own do is not in it; of the codecs here, only AVIF's decoder has some.
"""

import io
import time
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

# A slow function gets fewer runs: after so many seconds none is begun, but for the first few.
BUDGET_S = 0.5
FEWEST_RUNS = 3


class Yardstick:
    """Y: Pillow decodes a JPEG of 0.66 megapixels and resizes its shorter side to 384.

    It is measured again and again between the other measurements: the machine may slow down meanwhile.

    Attributes:
        measured_ms: what each measurement gave.
    """

    def __init__(self, scene: np.ndarray, repeats: int) -> None:
        """Make the JPEG (quality 90, 4:2:0) from a scene; a measurement is the median of `repeats` runs."""
        file = io.BytesIO()
        picture = ImageOps.fit(Image.fromarray(scene), (940, 704), Image.Resampling.BICUBIC)
        picture.save(file, "JPEG", quality=90)
        self._data, self._repeats = file.getvalue(), repeats
        self.measured_ms: list[float] = []

    def measure(self) -> None:
        """Measure once more."""
        self._decode_and_resize()
        times = [thread_s(self._decode_and_resize) for _ in range(self._repeats)]
        self.measured_ms.append(1000 * float(np.median(times)))

    @property
    def ms(self) -> float:
        """The median of all measurements, in milliseconds."""
        return float(np.median(self.measured_ms))

    def _decode_and_resize(self) -> None:
        with Image.open(io.BytesIO(self._data)) as image:
            image.convert("RGB").resize((round(940 * 384 / 704), 384), Image.Resampling.BICUBIC)


def thread_s(call: Callable[[], object]) -> float:
    """Return the processor time that the calling thread spends in a call, in seconds."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def typical_ms(function: Callable[[np.ndarray], object], images: list[np.ndarray], repeats: int) -> float:
    """Return the mean over the images of the median time of `function(image)`, in milliseconds.

    Every image gets `repeats` runs, in turns; fewer where they would take longer than `BUDGET_S`. One run
    that does not count comes first: it makes tables and gets memory.
    """
    function(images[0])
    times: list[list[float]] = [[] for _ in images]
    spent_s = 0.0
    for run in range(repeats * len(images)):
        if run >= FEWEST_RUNS and spent_s > BUDGET_S:
            break
        place = run % len(images)
        times[place].append(thread_s(lambda image=images[place]: function(image)))
        spent_s += times[place][-1]
    return 1000 * float(np.mean([np.median(of_image) for of_image in times if of_image]))
