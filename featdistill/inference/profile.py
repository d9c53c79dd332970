"""Where the time of a scoring run goes: what to change to make it faster."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
IMAGES, COMPUTING, DEVICE = "waiting for images", "computing", "waiting for the GPU"


class Profile:
    """The seconds that the main process spends on each part of a run.

    On a GPU, `computing` is the time to start kernels, and the GPU works during `waiting for the GPU`, which
    includes copies. With `--decode gpu`, `waiting for images` includes the time until they are decoded.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((IMAGES, COMPUTING, DEVICE), 0.0)
        self.start = time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the body to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def waited(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items, and add the time until each is there to the waiting for images."""
        iterator = iter(items)
        while True:
            with self.part(IMAGES):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def line(self) -> str:
        """Return the shares of the time since the start as one line; the rest is files, fusion and Python."""
        total = time.perf_counter() - self.start
        shares = [f"{seconds / total:.0%} {name}" for name, seconds in self.seconds.items() if seconds]
        rest = max(0.0, 1 - sum(self.seconds.values()) / total)
        return f"{total:.1f} s: {', '.join(shares)}, {rest:.0%} for the rest"
