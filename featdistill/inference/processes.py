"""Several processes that share a task, as torchrun starts them, and how an error in one ends all."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from featdistill.command_line import UserError, explained

T = TypeVar("T")
# Shares are equal, so no process should need this much longer than another.
_MAX_WAIT = timedelta(hours=2)


class Processes:
    """The processes that share a task; just this one unless torchrun or `accelerate launch` started it.

    They exchange small messages only, over gloo, whatever devices they compute on.

    Attributes:
        rank: the number of this process, from 0; 0 is the main process.
        world: the number of processes, over all machines.
    """

    def __init__(self) -> None:
        several = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
        rank, world = (os.environ["RANK"], os.environ["WORLD_SIZE"]) if several else ("0", "1")
        if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
            raise UserError(f"RANK {rank} of WORLD_SIZE {world} is not valid; unset both, or use torchrun")
        self.rank, self.world = int(rank), int(world)
        if self.world > 1:
            import torch
            from accelerate import PartialState

            # Else accelerate changes the number of threads, on which the last bits of the scores depend.
            os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
            try:
                self._state = PartialState(cpu=True, timeout=_MAX_WAIT)
            except (RuntimeError, ValueError) as error:
                raise UserError(f"cannot reach the other processes ({error})") from error

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def run(self, task: Callable[["Processes"], int]) -> int:
        """Return the exit status of a task that all processes run.

        Away from the main process it is 0, also after an error: the main process reports it, and a launcher
        would take any other status for a crash.
        """
        try:
            status = task(self)
        except (UserError, OSError):
            if self.is_main:
                raise
            status = 0
        finally:
            if self.world > 1:
                self._state.destroy_process_group()
        return status if self.is_main else 0

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` in every process and wait until all have done it.

        Raises:
            UserError: it failed in another process, or one is lost.
        """
        if self.world == 1:
            return work()
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        reasons = self._gather(failure and explained(failure))
        if failure:
            raise failure
        for rank, reason in enumerate(reasons):
            if reason:
                raise UserError(f"process {rank} of {self.world} failed: {reason}")
        return result

    def on_main(self, work: Callable[[], T]) -> T:
        """Do `work` in the main process, and return its result in every process; see `together`."""
        result = self.together(work if self.is_main else lambda: None)
        return result if self.world == 1 else self._gather(result)[0]

    def _gather(self, message: T) -> list[T]:
        from accelerate.utils import gather_object

        try:
            return gather_object([message])
        except RuntimeError as error:
            reason = str(error).partition("\n")[0][-200:]
            raise UserError(f"lost another process ({reason}); run the command again to continue") from error
