"""Which worker does which part of a task, for workers that come and go on any machine.

A lease is a file `PART.N` in a folder that all workers share. Creating it is how a worker takes the part; as
long as it works, it rewrites the file, and when it is done, it removes it. A lease that has not been
rewritten for some time is taken over by creating the file of the next number; of several workers that try,
one succeeds. Each worker measures that time with its own clock, so that the clocks of machines may differ.

A worker that was only slow, and whose lease was taken over, may finish the part as well. So its result must
not depend on the worker, and must be written only if there is none yet.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from featdistill.storage import Folder

_log = logging.getLogger(__name__)
# Rewrites of a lease in the time after which it is taken over; a few may fail.
_BEATS = 4


class Leases:
    """The leases of one worker.

    Args:
        folder: where the leases of all workers are.
        seconds: after which a lease that was not rewritten is taken over.
        clock: returns seconds.
    """

    def __init__(
        self, folder: str | Path, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder, self.seconds, self.clock = Folder(folder), seconds, clock
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        # Lease -> what it was when it was seen last, and since when it is that.
        self._seen: dict[str, tuple[bytes, float]] = {}

    def held(self) -> dict[str, str]:
        """Return part -> the file of its newest lease."""
        newest: dict[str, int] = {}
        for name in self.folder.names():
            part, _, number = name.rpartition(".")
            if number.isdigit():
                newest[part] = max(newest.get(part, 0), int(number))
        return {part: f"{part}.{number}" for part, number in newest.items()}

    def holder(self, lease: str) -> str:
        """Return the worker that holds a lease, for people to read."""
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
            return str(json.loads(self.folder.read(lease))["worker"])
        return "unknown"

    def take(self, part: str, lease: str | None) -> str | None:
        """Return the file of this worker's lease of a part, or None if another worker has the part.

        Args:
            lease: the newest one of the part according to `held`, or None.
        """
        if lease is None:
            mine = f"{part}.0"
        elif self._has_expired(lease):
            mine = f"{part}.{int(lease.rpartition('.')[2]) + 1}"
        else:
            return None
        if not self.folder.create(mine, self._content(0)):
            return None
        if lease:
            _log.info("%s: taking over from %s, which has stopped", part, self.holder(lease))
            self.folder.remove(lease)
        return mine

    @contextlib.contextmanager
    def kept(self, lease: str) -> Iterator[None]:
        """Rewrite a lease until the body ends, then remove it."""
        stopped = threading.Event()

        def beat() -> None:
            number = 0
            while not stopped.wait(self.seconds / _BEATS):
                number += 1
                try:
                    self.folder.write(lease, self._content(number))
                except Exception as error:  # of any kind: the next time it may work
                    _log.warning("cannot renew the lease %s: %s", lease, error)

        thread = threading.Thread(target=beat, name=f"lease {lease}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            self.folder.remove(lease)

    def _has_expired(self, lease: str) -> bool:
        try:
            content = self.folder.read(lease)
        except FileNotFoundError:  # its part is finished, or was given up
            self._seen.pop(lease, None)
            return False
        known, since = self._seen.get(lease, (None, 0.0))
        if content != known:
            self._seen[lease] = content, self.clock()
            return False
        return self.clock() - since >= self.seconds

    def _content(self, beat: int) -> bytes:
        return json.dumps({"worker": self.worker, "beat": beat}).encode()
