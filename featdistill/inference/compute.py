"""What makes experts faster on one device: compiled forward passes, and as many images at once as fit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from featdistill.command_line import UserError
from featdistill.inference.precision import attention_kernels
from featdistill.models.expert import Expert

DEFAULT_BATCH_SIZE = 32
# Ours: beyond 128 images nothing is gained on an H200, where one expert's matrix products fill the device.
SMALLEST_BATCH, LARGEST_BATCH = 8, 128
# Ours: other programs, and the library's working memory that grows later, need room as well.
_SHARE_OF_FREE = 0.4


def automatic_batch_size(experts: Sequence[Expert], device: torch.device) -> int:
    """Return how many images a batch should have: 32 on a CPU; on a GPU a power of two from 8 to 128.

    The largest is taken whose peak memory, estimated from a forward pass of 8 images through each expert, is
    at most 0.4 of what is free.

    Raises:
        UserError: not even 8 images fit.
    """
    if device.type != "cuda":
        return DEFAULT_BATCH_SIZE
    with full_memory_is_an_error():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _run_once(experts, SMALLEST_BATCH, device)
        bytes_an_image = (torch.cuda.max_memory_allocated(device) - before) / SMALLEST_BATCH
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
    return _largest_batch(_SHARE_OF_FREE * free / bytes_an_image)


def compile_experts(experts: Sequence[Expert], batch_size: int, device: torch.device) -> list[nn.Module]:
    """Compile experts for batches of exactly `batch_size` uint8 images.

    The compiled code is made here and not at the first batch, so that a failure comes at once.

    Raises:
        UserError: this machine cannot compile.
    """
    compiled = [torch.compile(expert, dynamic=False) for expert in experts]
    try:
        _run_once(compiled, batch_size, device)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise UserError(
            f"--compile does not work on this machine ({reason}); it needs a C++ compiler, and Triton on a "
            "GPU; leave --compile out"
        ) from error
    return compiled


@contextmanager
def full_memory_is_an_error() -> Iterator[None]:
    """Turn a GPU's full memory into a `UserError` that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory is full; give a smaller --batch-size") from error


def _largest_batch(fits: float) -> int:
    batch_size = SMALLEST_BATCH
    while batch_size * 2 <= min(fits, LARGEST_BATCH):
        batch_size *= 2
    return batch_size


def _run_once(experts: Sequence[nn.Module], batch_size: int, device: torch.device) -> None:
    for expert in experts:
        size = expert.preprocessing.size
        # Made outside of inference mode, as the batches are: what is compiled is only good for the same kind.
        images = torch.zeros((batch_size, 3, size, size), dtype=torch.uint8, device=device)
        with torch.inference_mode(), attention_kernels(device):
            expert(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
