"""Memory for intermediate results: allocating large arrays can take longer than the work done in them.

Intermediate results are therefore made per strip of the image, which stays in the processor's cache, or,
where the whole image is needed at once, in memory that is reused from call to call.
"""

import math
import threading
from collections.abc import Callable

import numpy as np

_STRIP_SAMPLES = 1 << 18
_REUSED_BYTES = 1 << 23
_memory = threading.local()


def in_strips(
    function: Callable[[np.ndarray], np.ndarray], image: np.ndarray, reach_px: int = 0
) -> np.ndarray:
    """Apply a function of (h, W, 3) uint8 to strips of an image, from top to bottom.

    Strips overlap by `reach_px`, the number of rows away that a pixel can influence a result.
    """
    height, width = image.shape[:2]
    rows = max(1, 4 * reach_px, _STRIP_SAMPLES // (3 * width))
    result = np.empty_like(image, order="C")
    for top in range(0, height, rows):
        first = max(0, top - reach_px)
        strip = function(image[first : top + rows + reach_px])
        result[top : top + rows] = strip[top - first :][:rows]
    return result


def scratch_array(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return an uninitialized array, in the memory of this thread's previous call with the same name.

    An operation must never return it. Arrays above 8 MiB are allocated anew.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = _memory.__dict__.get(name)
    if memory is None or len(memory) < size:
        memory = np.empty(size, np.uint8)
        if size <= _REUSED_BYTES:
            setattr(_memory, name, memory)
    return memory[:size].view(dtype).reshape(shape)
