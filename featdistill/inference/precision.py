"""The numbers that experts compute with: weights cast for inference, or autocast, and attention kernels.

| name | weights and arithmetic of the backbone |
|---|---|
| `fp32` | float32 |
| `bf16`, `fp16` | really of this type: half the memory, no casting of weights at every step |
| `fp8` | bfloat16, with the linear layers of the blocks in 8-bit floats; see `featdistill.inference.float8` |

The head, the normalisation of the images and the logits stay in float32, so that scores do not tie.
"""

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from featdistill.models.expert import Expert

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
# At SigLIP So400M's head width of 72, cuDNN's kernel is 1.4 times faster than flash attention on an H200.
# Each is left out where it does not serve the shape or the type.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_HOPPER = (9, 0)


def cast(expert: Expert, precision: str) -> Expert:
    """Cast the weights of an expert's backbone in place; the result is for inference only.

    Args:
        precision: one of `PRECISIONS`; for `fp8` the linear layers are still to be replaced.
    """
    expert.backbone.to(PRECISIONS[precision])
    return expert


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context in which a forward pass of float32 weights has the given precision."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision])


def attention_kernels(device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context in which attention takes the kernel that is the fastest on the device.

    From Hopper on the order is ours; elsewhere it is PyTorch's own.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _HOPPER:
        return contextlib.nullcontext()
    return sdpa_kernel(_ATTENTION, set_priority=True)
