"""Processes that a test starts, as torchrun would, without the seconds that importing PyTorch takes."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable

import accelerate.utils  # noqa: F401 (before the forks, which then need not import it)
import pytest
import torch
from accelerate.state import AcceleratorState

needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(), reason="PyTorch cannot be forked once it uses a GPU"
)


def fork(task: Callable[[], int | None], world: int = 1) -> list[multiprocessing.Process]:
    """Start `sys.exit(task())` in `world` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def main(rank: int) -> None:
        # After a fork, PyTorch's threads would wait for others that do not exist.
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        if world > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), **address}
        sys.exit(task())

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=main, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def statuses(processes: list[multiprocessing.Process]) -> list[int | None]:
    """Wait for processes to end and return their exit statuses."""
    for process in processes:
        process.join(600)
    return [process.exitcode for process in processes]
