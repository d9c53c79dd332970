"""One function over many images: in several processes, in order, with a progress bar."""

import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

import cv2

from featdistill import command_line
from featdistill.command_line import UserError
from featdistill.process_setup import keep_freed_memory

_ITEMS_PER_TASK = 16
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, title: str, *, done: int = 0
) -> list[Result]:
    """Return `function(item)` for each item, in order.

    Args:
        function: defined at the top level of a module, so that other processes can import it.
        workers: number of processes; with 1, or for few items, this process does the work.
        title: of the progress bar.
        done: number of items finished earlier, which the bar counts too.
    """
    results = []
    tasks = -(-len(items) // _ITEMS_PER_TASK)
    with command_line.progress(done + len(items), title, initial=done) as bar:
        if workers == 1 or tasks <= 2:
            for item in items:
                results.append(function(item))
                bar.update()
            return results
        # Spawned: a forked process that had threads, such as OpenCV's or the bar's, may deadlock.
        context = get_context("spawn")
        with ProcessPoolExecutor(min(workers, tasks), context, initializer=_set_up_worker) as pool:
            try:
                for result in pool.map(function, items, chunksize=_ITEMS_PER_TASK):
                    results.append(result)
                    bar.update()
            except BrokenProcessPool as error:
                raise UserError("a worker process died; try fewer --workers") from error
    return results


def _set_up_worker() -> None:
    # Ctrl-C reaches all processes; the first one stops the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
    keep_freed_memory()
