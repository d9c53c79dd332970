"""Settings of a whole process: quick imports, reuse of freed memory, and one thread per loader worker."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt: how many free bytes at the top of the heap are returned to the system, and
# from which size an array gets pages of its own, which are returned as soon as it is freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 1 << 30


@contextmanager
def large_imports() -> Iterator[None]:
    """Provide a context in which PyTorch, and what is built on it, is imported in less time.

    Python searches all objects for garbage again and again while they become more, and a last time when it
    ends. What is imported is needed until then, so it is left out: on one core, the imports of a training run
    take 3.8 instead of 5.0 s, and its end 0.2 instead of 1.6 s. Nothing is done if PyTorch is there already.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed arrays for later ones.

    Returned memory comes back page by page, each cleared by the system. For images of a megapixel that can
    take longer than the work on them, so processes that handle one image after another call this. Returns
    whether it took effect, which needs glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_MMAP_THRESHOLD, _NEVER))


def one_thread(worker: int = 0) -> None:
    """Set up a loader worker: the workers run in parallel, and threads would compete for their cores.

    This also switches off OpenCL, because OpenCV would use it on any device it finds.
    """
    import cv2
    import torch

    keep_freed_memory()
    cv2.setNumThreads(0)
    cv2.ocl.setUseOpenCL(False)
    torch.set_num_threads(1)
