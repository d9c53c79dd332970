"""SIGTERM asks a run to save and leave: what a batch system sends before it takes the machine away."""

import os
import signal
from types import FrameType, TracebackType


class Preemption:
    """While entered, SIGTERM only sets `asked`; a second one, during the save, changes nothing.

    Loader workers are forked with the handler and so outlive the signal, which may have been sent to the
    whole process group: the step under way still needs them.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Preemption":
        self._process = os.getpid()
        self._former = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._former)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = os.getpid() == self._process
