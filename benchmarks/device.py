"""What the GPU or CPU at hand does: time and memory of a step, and the rate of its matrix products.

Shares are of the rate that is measured in the same process, for large square products in the same precision,
not of the data sheet's.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from featdistill.inference.compute import choose_device
from featdistill.models.backbones import BackboneSpec, build
from featdistill.models.expert import Expert

GIB = 2**30


def find_device(name: str | None) -> tuple[torch.device, str]:
    """Return the named device, or by default a GPU if there is one, and its title for reports."""
    device = choose_device(name)
    return device, torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_s(step: Callable[[], object], device: torch.device, *, steps: int, warmup: int) -> float:
    """Return the median wall-clock time of one step, in seconds.

    Steps are timed in blocks of five, so that the steps of a block overlap as they do in use.
    """
    for _ in range(warmup):
        step()
    synchronize(device)
    block, times = min(5, steps), []
    for _ in range(max(1, steps // block)):
        start = time.perf_counter()
        for _ in range(block):
            step()
        synchronize(device)
        times.append((time.perf_counter() - start) / block)
    return statistics.median(times)


def step_s_within(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    """As `step_s`, with as many steps as take about `seconds`, after a tenth of them unmeasured."""
    once = step_s(step, device, steps=1, warmup=1)
    steps = max(1, min(1000, int(seconds / once)))
    return step_s(step, device, steps=steps, warmup=steps // 10)


def reset_peak(device: torch.device) -> None:
    """Start measuring the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Return the peak memory of tensors since `reset_peak`, in GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None


def matrix_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / step_s(lambda: left @ right, device, steps=20, warmup=5)


def forward_flops(spec: BackboneSpec) -> float:
    """Return the floating-point operations of a new expert's forward pass on one image; it is not run."""
    with torch.device("meta"):
        expert = Expert(build(spec), spec).requires_grad_(False)
        size = expert.preprocessing.size
        with FlopCounterMode(display=False) as counter:
            expert(torch.empty(1, 3, size, size))
    return float(counter.get_total_flops())
