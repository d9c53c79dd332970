"""What the GPU or CPU at hand does: time and memory of a step, and the rate of its matrix products.

The measured rate, not the data sheet's, is what a share is taken of: large square products in the same
precision, in the same process.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from featdistill.models.backbones import BackboneSpec, build, resolve_spec
from featdistill.models.expert import Expert

GIB = 2**30


def synchronise(device: torch.device) -> None:
    """Wait until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_s(step: Callable[[], object], device: torch.device, *, steps: int, warmup: int) -> float:
    """Return the median time on the clock of one step, in seconds.

    The device is waited for once a block of five steps, so that the steps of a block overlap as they do in
    earnest.
    """
    for _ in range(warmup):
        step()
    synchronise(device)
    block, times = min(5, steps), []
    for _ in range(max(1, steps // block)):
        start = time.perf_counter()
        for _ in range(block):
            step()
        synchronise(device)
        times.append((time.perf_counter() - start) / block)
    return statistics.median(times)


def step_s_within(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    """As `step_s`, with as many steps as take about `seconds`, a tenth of them unmeasured."""
    step()
    once = step_s(step, device, steps=1, warmup=0)
    steps = max(1, min(1000, int(seconds / once)))
    return step_s(step, device, steps=steps, warmup=steps // 10)


def forget_peak(device: torch.device) -> None:
    """Start measuring the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Return the most memory that tensors have taken since `forget_peak`, in GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None


def matrix_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    took = step_s(lambda: left @ right, device, steps=20, warmup=5)
    return 2 * side**3 / took


def forward_flops(backbone: str, input_size: int | None = None) -> float:
    """Return the floating-point operations of an expert's forward pass on one image; nothing is computed."""
    return spec_flops(resolve_spec(backbone, input_size))


def spec_flops(spec: BackboneSpec) -> float:
    """As `forward_flops`, of an expert on this backbone; its head is that of a new one."""
    with torch.device("meta"):
        expert = Expert(build(spec), spec).requires_grad_(False)
        size = expert.preprocessing.size
        with FlopCounterMode(display=False) as counter:
            expert(torch.empty(1, 3, size, size))
    return float(counter.get_total_flops())
