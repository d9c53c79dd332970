"""The flags of an ensemble, each declared once for all commands that have it; without PyTorch."""

from argparse import Namespace
from typing import Any

from featdistill.command_line import worker_count

FLAGS: dict[str, dict[str, Any]] = {
    "experts": {
        "nargs": "+",
        "default": [],
        "metavar": "DIR",
        "help": "experts' folders, hub:OWNER/NAME (docs/hub.md), onnx:DIR for exported ones, or "
        "published:NAME for published detectors (docs/published.md)",
    },
    "released": {"metavar": "DIR", "help": "folder of the authors' released experts"},
    "fusion": {
        "default": "probability_mean",
        "metavar": "HOW",
        "help": "probability_mean, logit_mean, or a file written by python -m featdistill fuse",
    },
    "weights": {"metavar": "A=2,B=1", "help": "weights of the experts (default: equal)"},
    "tta": {
        "default": "none",
        "metavar": "VIEWS",
        "help": "views of an image to average over: none, hflip, five_crop, scales, blur, jpeg, rapid, "
        "redelivery, or several joined by +",
    },
    "resize": {
        "choices": ("shorter", "squash", "crop"),
        "help": "how images become inputs (default: as each expert was trained)",
    },
    "calibrator": {
        "metavar": "FILE",
        "help": "file written by python -m featdistill calibrate; adds the verdict real, unsure or AI",
    },
    "batch_size": {
        "default": "auto",
        "metavar": "N",
        "help": "images per batch; auto: 32 on a CPU, as many as the free memory allows on a GPU",
    },
    "workers": {
        "type": worker_count(),
        "help": "loader processes (default: the cores of each process; at most 32 with a GPU, 8 without)",
    },
    "precision": {
        "metavar": "NAME",
        "help": "arithmetic of the experts: fp32, bf16, fp16 or fp8 (default: bf16 on a GPU, and for large "
        "experts on a processor that multiplies bf16; else fp32)",
    },
    "compile": {
        "action": "store_true",
        "dest": "compiled",
        "help": "compile the experts first; takes a minute",
    },
    "decode": {
        "choices": ("cpu", "gpu"),
        "default": "cpu",
        "help": "gpu: decode JPEGs on the GPU, where it waits for the loader; scores change a little",
    },
    "device": {"help": "cuda, cuda:1, cpu, ... (default: a GPU if there is one)"},
}
# What becomes arguments of `load_ensemble`.
_SETTINGS = ("released", "resize", "fusion", "weights", "tta")
_SETTINGS += ("device", "precision", "batch_size", "workers", "compiled", "decode")


def add_flags(group: Any, *names: str, **changes: dict[str, Any]) -> None:
    """Add flags to a parser or one of its groups.

    Args:
        names: those of `FLAGS`.
        changes: name -> arguments of `add_argument` that differ for this command.
    """
    for name in names:
        group.add_argument(f"--{name.replace('_', '-')}", **FLAGS[name] | changes.get(name, {}))


def load_settings(args: Namespace) -> dict[str, Any]:
    """Return the arguments of `load_ensemble` for the flags that a command has and that have a value."""
    return {name: getattr(args, name) for name in _SETTINGS if getattr(args, name, None) is not None}
