"""How experts compute on a device: precision, attention kernels, compilation, and the batch size that fits.

| precision | weights and arithmetic of the backbone |
|---|---|
| `fp32` | float32 |
| `bf16`, `fp16` | weights of this type: half the memory, and no casting at every step |
| `fp8` | bfloat16, with the linear layers of the blocks in 8-bit floats; see `featdistill.inference.float8` |

The head, the normalization of the images and the logits stay in float32, so that scores do not tie.
"""

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from featdistill.command_line import UserError, one_of
from featdistill.models.expert import Expert

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
# At SigLIP So400M's head width of 72, cuDNN's kernel is 1.4 times as fast as flash attention on an H200.
# PyTorch skips a kernel that does not support the shape or the type.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_HOPPER = (9, 0)
# Ours: on a core with AVX-512 BF16, bf16 takes .41 to .56 of the time for ConvNeXt-T, Swin-T, ViT-S/16
# and ViT-B/16, which have 17 to 85 million weights in linear layers; small networks have little to gain.
_LARGE = 10_000_000

DEFAULT_BATCH_SIZE = 32
# Ours: more than 128 images gain nothing on an H200, where one expert's matrix products fill the device.
SMALLEST_BATCH, LARGEST_BATCH = 8, 128
# Ours: leaves room for other programs and for the library's working memory, which grows later.
_SHARE_OF_FREE = 0.4


def named_device(name: str | None = None) -> torch.device:
    """Return the device called `name`, by default a GPU if there is one; it is not used yet."""
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device; use cuda, cuda:1 or cpu") from error


def choose_device(name: str | None = None) -> torch.device:
    """Return the device called `name`; by default a GPU if there is one, another for each local process."""
    device = named_device(name)
    if device.type != "cuda":
        try:
            torch.zeros(1, device=device).item()
        except Exception as error:  # each backend that is missing raises an error of its own type
            raise UserError(f"--device {name} is not available on this machine; use cpu") from error
        return device
    count = torch.cuda.device_count()
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(1, count))
    if device.index >= count:
        raise UserError(f"there is no GPU {device}, only {count} GPUs are visible; use another --device")
    # The thread that page-locks batches uses the current device.
    torch.cuda.set_device(device)
    return device


def choose_precision(name: str | None, device: torch.device, experts: Collection[nn.Module] = ()) -> str:
    """Return the precision called `name`, if the device supports it.

    By default, it is bf16 on a GPU, and on a processor that multiplies bfloat16 where all experts are large:
    there it halves the time. Elsewhere it is fp32.
    """
    if name is None:
        is_large = bool(experts) and min(map(_linear_weights, experts)) >= _LARGE
        name = "bf16" if device.type == "cuda" or (is_large and multiplies_bfloat16()) else "fp32"
    name = one_of("precision", name, PRECISIONS)
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; use --precision bf16 or fp32")
    return name


def cast(expert: nn.Module, precision: str) -> nn.Module:
    """Cast an expert's backbone in place, for inference only; for `fp8` see also `with_float8`.

    A graph, which has the arithmetic it was exported with, stays as it is.
    """
    if isinstance(expert, Expert):
        expert.backbone.to(PRECISIONS[precision])
    return expert


def multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for products of bfloat16 (AVX-512 BF16, AMX)."""
    found = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(is_supported() for is_supported in found if is_supported)


def _linear_weights(expert: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in expert.modules() if isinstance(layer, nn.Linear))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context in which a forward pass of float32 weights has the given precision."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision])


def attention_kernels(device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context in which attention uses the fastest kernel; our order from Hopper on.

    A compiled function keeps the kernels of the context in which it was compiled. Where activations are
    recomputed, the backward pass needs the context of the forward pass.
    """
    prefers = _prefers_our_order(device)
    return sdpa_kernel(_ATTENTION, set_priority=True) if prefers else contextlib.nullcontext()


def _prefers_our_order(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER


def set_up_compiler(device: torch.device) -> None:
    """Let compiled code be found again by later processes, for the attention kernels that it was made for.

    It is kept in `TORCHINDUCTOR_CACHE_DIR`, by default below the user's cache folder (`XDG_CACHE_HOME`, or
    `~/.cache`), where PyTorch's own default is a temporary folder. PyTorch looks compiled code up without
    asking which attention kernels were preferred, so that is added to the key.

    Dropout draws the masks that it draws without compiling.
    """
    torch._inductor.config.fallback_random = True
    # PyTorch itself sets the variable when it is loaded.
    temporary = os.path.join(tempfile.gettempdir(), "torchinductor_")
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", temporary).startswith(temporary):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "featdistill/compiled"
        # Where that cannot be written, PyTorch's default remains.
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    if _prefers_our_order(device):
        torch.compiler.config.cache_key_tag = "cuDNN attention first"


def automatic_batch_size(experts: Sequence[Expert], device: torch.device) -> int:
    """Return how many images a batch should have: 32 on a CPU; on a GPU a power of two from 8 to 128.

    Its peak memory, estimated from a forward pass of 8 images through each expert, is at most 0.4 of the free
    memory.

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
        bytes_per_image = (torch.cuda.max_memory_allocated(device) - before) / SMALLEST_BATCH
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
    return largest_batch(_SHARE_OF_FREE * free / bytes_per_image)


def largest_batch(max_images: float) -> int:
    """Return the largest power of two from 8 to 128 that is at most `max_images`; 8 if there is none."""
    fitting = int(min(max(max_images, SMALLEST_BATCH), LARGEST_BATCH))
    return 1 << (fitting.bit_length() - 1)


def compile_experts(
    experts: Sequence[Expert], batch_size: int, device: torch.device, **options: Any
) -> list[nn.Module]:
    """Compile experts for batches of exactly `batch_size` uint8 images, or raise a `UserError`.

    Args:
        options: further arguments of `torch.compile`.
    """
    set_up_compiler(device)
    compiled = [torch.compile(expert, dynamic=False, **options) for expert in experts]
    with failed_compilation_is_an_error():
        # Compiled now and not at the first batch, so that a failure shows at once.
        _run_once(compiled, batch_size, device)
    return compiled


@contextlib.contextmanager
def failed_compilation_is_an_error() -> Iterator[None]:
    """Turn an error of PyTorch's compiler into a `UserError` that says what to do."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        # Without PyTorch's advice for its developers.
        reason = " ".join(str(error).split("Set TORCHDYNAMO_VERBOSE")[0].split())[:200]
        raise UserError(
            f"--compile does not work on this machine ({reason}); it needs a C++ compiler, and Triton on a "
            "GPU; leave --compile out, or train with --compile false"
        ) from error


@contextlib.contextmanager
def full_memory_is_an_error() -> Iterator[None]:
    """Turn an out-of-memory error of the GPU into a `UserError` that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory is full; use a smaller --batch-size") from error


def _run_once(experts: Sequence[nn.Module], batch_size: int, device: torch.device) -> None:
    for expert in experts:
        size = expert.preprocessing.size
        # Created outside inference mode, as batches are: compiled code serves only tensors of the same kind.
        images = torch.zeros((batch_size, 3, size, size), dtype=torch.uint8, device=device)
        with torch.inference_mode(), attention_kernels(device):
            expert(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
