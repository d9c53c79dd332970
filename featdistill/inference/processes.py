"""Processes that share one task, as torchrun and `accelerate launch` start them: who am I, and waiting.

They need no connection: what one process has to tell another, it writes to a file in a folder that all
of them see.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from featdistill.command_line import UserError

T = TypeVar("T")
_POLL_S = 0.2
# Longer than loading the largest experts and scoring one batch of them on a slow CPU takes.
SILENCE_S = 1800.0


@dataclass(frozen=True)
class Process:
    """One of the processes that share a task.

    Attributes:
        rank: its number, from 0; 0 is the main process.
        world: how many processes there are, over all machines.
        local_rank, local_world: the same within its machine; `local_rank` picks the GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> "Process":
        """Read `RANK`, `WORLD_SIZE`, `LOCAL_RANK` and `LOCAL_WORLD_SIZE`; without the first two, one process.

        Raises:
            UserError: they are no numbers, or the rank is not below the number of processes.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_rank = int(os.environ.get("LOCAL_RANK", rank))
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        except ValueError as error:
            raise UserError(f"RANK, WORLD_SIZE and their local kin must be whole numbers: {error}") from error
        if not (0 <= rank < world and local_rank >= 0 and local_world >= 1):
            raise UserError(f"RANK {rank} of WORLD_SIZE {world} is no process; unset both, or use torchrun")
        return cls(rank, world, local_rank, local_world)


def wait_for(
    poll: Callable[[], T | None], what: str, *, sign_of_life: Callable[[], object] | None = None
) -> T:
    """Call `poll` until it returns something other than None, and return that.

    Args:
        what: what is waited for, for the message.
        sign_of_life: its result changes as long as the other processes are at work.

    Raises:
        UserError: nothing came, and nothing changed, for `SILENCE_S` seconds.
    """
    since, last = time.monotonic(), None
    while (found := poll()) is None:
        now = sign_of_life() if sign_of_life else None
        if now != last:
            since, last = time.monotonic(), now
        if time.monotonic() - since > SILENCE_S:
            raise UserError(
                f"no sign of another process for {SILENCE_S / 60:.0f} minutes while waiting for {what}; "
                "run the same command again to continue"
            )
        time.sleep(_POLL_S)
    return found
