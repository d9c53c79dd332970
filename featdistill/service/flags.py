"""The flags of `python -m featdistill serve`, and what is refused before anything takes time; no PyTorch."""

import importlib.util
import ipaddress
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from featdistill.command_line import Parser, UserError, within, worker_count
from featdistill.inference.flags import add_flags

KEY_VARIABLE = "FEATDISTILL_API_KEY"
_SHORTEST_KEY = 16
# What is imported, and how pip calls it.
_PACKAGES = {
    "fastapi": "fastapi",
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}


def _limit(default: float, kind: Callable[[str], float], text: str) -> Any:
    return field(default=default, metadata={"type": kind, "help": text})


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take; each limit is a flag."""

    max_mb: float = _limit(20.0, within(0.001, 4096, float), "size of a request, in MB of 2^20 bytes")
    max_held_mb: float = _limit(
        512.0, within(0.001, 65536, float), "of all requests that are not decoded yet"
    )
    max_pixels: int = _limit(50_000_000, within(1), "of an image; decoding needs up to 12 bytes for each")
    max_images: int = _limit(16, within(1, 1024), "images of a request")
    queue: int = _limit(256, within(1, 100_000), "images of all requests, until they are answered")
    timeout: float = _limit(
        30.0, within(0.1, 3600, float), "seconds from the headers of a request to its answer"
    )
    wait_ms: float = _limit(2.0, within(0, 1000, float), "how long a batch waits for other requests")
    decoders: int = _limit(2, worker_count(1), "threads that decode images")

    @property
    def max_bytes(self) -> int:
        return int(self.max_mb * 2**20)

    @property
    def max_held_bytes(self) -> int:
        return int(self.max_held_mb * 2**20)


def add_arguments(parser: Parser) -> None:
    """Add the flags in groups."""
    add_flags(
        parser.add_argument_group("ensemble"),
        *("experts", "calibrator", "fusion", "weights", "tta", "device", "precision", "batch_size"),
        experts={"required": True},
        precision={"help": "fp32, bf16 or fp16 (default: as predict.py)"},
        batch_size={
            "help": "most images scored together; with 1, scores do not depend on other requests, not even "
            "in their last bits (default: 32)"
        },
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host",
        default="127.0.0.1",
        help=f"address to listen on; other machines need a key, in the environment variable {KEY_VARIABLE}",
    )
    network.add_argument(
        "--port", type=within(0, 65535), default=8000, help="port to listen on; 0: any that is free"
    )
    limits = parser.add_argument_group("limits")
    for limit in fields(Limits):
        flag = f"--{limit.name.replace('_', '-')}"
        limits.add_argument(flag, default=limit.default, metavar="N", **limit.metadata)


def check(args: Namespace) -> tuple[Limits, str]:
    """Return the limits, and the key that requests must carry, or "".

    Raises:
        UserError: packages are missing, others could reach the service without a key, or limits contradict.
    """
    if missing := [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]:
        plural = "s" if len(missing) > 1 else ""
        raise UserError(
            f"serve needs the package{plural} {', '.join(missing)}; run pip install {' '.join(missing)}"
        )
    key = os.environ.get(KEY_VARIABLE, "").strip()  # a file of secrets may end in a newline
    if not key and not _is_loopback(args.host):
        raise UserError(
            f"everyone who can reach {args.host} could use the service; set a key in the environment "
            f"variable {KEY_VARIABLE}, or leave out --host"
        )
    if key and len(key) < _SHORTEST_KEY:
        raise UserError(f"the key in {KEY_VARIABLE} must have at least {_SHORTEST_KEY} characters")
    if args.queue < args.max_images:
        raise UserError(f"--queue {args.queue} is too short for a request of --max-images {args.max_images}")
    if args.max_held_mb < args.max_mb:
        raise UserError(f"--max-held-mb {args.max_held_mb:g} is less than --max-mb {args.max_mb:g}")
    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
    return limits, key


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
