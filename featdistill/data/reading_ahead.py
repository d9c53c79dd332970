"""Images of a batch in object storage are read several at once: each takes tens of milliseconds."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from featdistill.images.reading import read_bytes
from featdistill.remote_files import is_remote

THREADS = 16
# What may be read and not used yet, in each process; and besides what each thread is reading.
BUDGET_BYTES = 64 << 20


@contextmanager
def reading_ahead(locations: Sequence[str]) -> Iterator[Callable[[str], bytes]]:
    """Provide `read_bytes` for some locations that will be read in this order, each once or more often.

    Those at addresses are read ahead by `THREADS` threads, which pause while `BUDGET_BYTES` wait.
    """
    remote = list(dict.fromkeys(filter(is_remote, locations)))
    if len(remote) < 2:
        yield read_bytes
        return
    space = threading.Condition()
    waiting, wanted, is_over = 0, "", False

    def fetch(location: str) -> bytes:
        nonlocal waiting
        with space:
            space.wait_for(lambda: waiting < BUDGET_BYTES or wanted == location or is_over)
        data = b"" if is_over else read_bytes(location)
        with space:
            waiting += len(data)
        return data

    def read(location: str) -> bytes:
        nonlocal waiting, wanted
        if (future := futures.pop(location, None)) is None:
            return read_bytes(location)
        with space:
            wanted = location  # those that wait may all come later
            space.notify_all()
        data = future.result()
        with space:
            waiting -= len(data)
            space.notify_all()
        return data

    with ThreadPoolExecutor(min(THREADS, len(remote))) as pool:
        futures: dict[str, Future] = {location: pool.submit(fetch, location) for location in remote}
        try:
            yield read
        finally:
            with space:
                is_over = True
                space.notify_all()
