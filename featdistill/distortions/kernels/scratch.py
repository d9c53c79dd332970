"""Memory for intermediate results: new memory for large arrays can cost more time than the work done in it.

So intermediate results are made for strips of the image, which stay in the processor's cache, or, where the
whole image is needed at once, in memory that is kept from call to call.
"""

import math
import threading
from collections.abc import Callable

import numpy as np

_STRIP_SAMPLES = 1 << 18
_KEPT_BYTES = 1 << 23
_memory = threading.local()


def in_strips(
    function: Callable[[np.ndarray], np.ndarray], image: np.ndarray, reach_px: int = 0
) -> np.ndarray:
    """Apply a function to strips of the image, with as many rows more on both sides as it reaches.

    Args:
        function: (h, W, 3) uint8 -> (h, W, 3) uint8; called for the strips from top to bottom.
        image: (H, W, 3) uint8.
        reach_px: how many rows away a pixel can be that a result depends on.

    Returns:
        (H, W, 3) uint8, a new array.
    """
    height, width = image.shape[:2]
    rows = max(1, 4 * reach_px, _STRIP_SAMPLES // (3 * width))
    result = np.empty_like(image, order="C")
    for top in range(0, height, rows):
        first = max(0, top - reach_px)
        strip = function(image[first : top + rows + reach_px])
        result[top : top + rows] = strip[top - first :][:rows]
    return result


def kept(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return an array of any content, in the memory that the thread's last call of that name got.

    Never to be returned by an operation. Beyond 8 MiB the memory is new and is not kept.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = _memory.__dict__.get(name)
    if memory is None or len(memory) < size:
        memory = np.empty(size, np.uint8)
        if size <= _KEPT_BYTES:
            setattr(_memory, name, memory)
    return memory[:size].view(dtype).reshape(shape)
