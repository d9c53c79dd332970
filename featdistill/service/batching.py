"""Images of all requests, scored in batches by one thread."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import islice

from featdistill.inference.detector import Detection, Detector, Prepared

_log = logging.getLogger(__name__)

# Calls in a row that fail before the process is taken for broken, such as after an error of the device.
_MAX_FAILURES = 3
# A call that takes longer hangs.
_STUCK_S = 300


class Batcher:
    """Gathers prepared images and scores up to `detector.batch_size` of them at a time.

    Args:
        wait_s: how long a batch that is not full waits for more images.
        on_batch: called with the number of images of each batch.
    """

    def __init__(self, detector: Detector, wait_s: float, on_batch: Callable[[int], None]) -> None:
        self._detector, self._wait_s, self._on_batch = detector, wait_s, on_batch
        self._waiting: dict[Future[Detection], Prepared] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._failures, self._busy_since = 0, None
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    def submit(self, picture: Prepared) -> Future[Detection]:
        """Queue an image; its row, without a name, is the future's result. Cancelling takes it out again."""
        future: Future[Detection] = Future()
        with self._changed:
            self._waiting[future] = picture
            self._changed.notify()
        future.add_done_callback(self._forget)
        return future

    def problem(self) -> str | None:
        """Return why nothing can be scored any more, or None."""
        since = self._busy_since
        if not self._thread.is_alive():
            return "the scoring thread has ended"
        if self._failures >= _MAX_FAILURES:
            return f"scoring has failed {self._failures} times in a row"
        if since is not None and time.monotonic() - since > _STUCK_S:
            return f"a batch has taken more than {_STUCK_S} s"
        return None

    def stop(self, timeout_s: float) -> None:
        """Score what is queued, and end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _forget(self, future: Future[Detection]) -> None:
        with self._changed:
            self._waiting.pop(future, None)

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            if batch:
                self._on_batch(len(batch))
                self._busy_since = time.monotonic()
                self._score(batch)
                self._busy_since = None

    def _take(self) -> list[tuple[Future[Detection], Prepared]] | None:
        """Wait for a batch and take it out of the queue; None at the end."""
        size = self._detector.batch_size
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            self._changed.wait_for(lambda: len(self._waiting) >= size or self._stopping, self._wait_s)
            if self._stopping and not self._waiting:
                return None
            futures = list(islice(self._waiting, size))
            taken = [(future, self._waiting.pop(future)) for future in futures]
        return [(future, picture) for future, picture in taken if future.set_running_or_notify_cancel()]

    def _score(self, batch: list[tuple[Future[Detection], Prepared]]) -> None:
        """Score a batch; if that fails, perhaps for lack of memory, its halves."""
        futures, pictures = zip(*batch, strict=True)
        try:
            rows = self._detector.rows(pictures)
        except Exception as error:
            if len(batch) > 1:
                half = len(batch) // 2
                self._score(batch[:half])
                self._score(batch[half:])
                return
            self._failures += 1
            _log.exception("scoring failed")
            futures[0].set_exception(error)
            return
        self._failures = 0
        for future, row in zip(futures, rows, strict=True):
            future.set_result(row)
