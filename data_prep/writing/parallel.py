"""One function over many images: in several processes, in the order given, with a bar."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

import cv2

from featdistill import command_line
from featdistill.command_line import UserError

_IMAGES_A_TASK = 32
Result = TypeVar("Result")


def map_images(
    function: Callable[[str], Result], locations: Sequence[str], workers: int, what: str
) -> list[Result]:
    """Return `function(location)` for each location.

    Args:
        function: a module's own function, so that other processes can import it; it must not raise.
        locations: what a manifest calls the images.
        workers: number of processes; with 1, or for a few images, the work is done in this one.
        what: title of the bar.

    Raises:
        UserError: `workers` is below 1, or a process died.
    """
    if workers < 1:
        raise UserError(f"--workers must be 1 or more, not {workers}")
    results = []
    with command_line.progress(len(locations), what) as bar:
        if workers == 1 or len(locations) <= 2 * _IMAGES_A_TASK:
            for location in locations:
                results.append(function(location))
                bar.update()
            return results
        # Forking a process that has threads, the bar's among them, may lock up.
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_set_up_worker)
        with pool:
            try:
                for result in pool.map(function, locations, chunksize=_IMAGES_A_TASK):
                    results.append(result)
                    bar.update()
            except BrokenProcessPool as error:
                raise UserError("a process died while it read images; try fewer --workers") from error
    return results


def _set_up_worker() -> None:
    cv2.setNumThreads(0)
