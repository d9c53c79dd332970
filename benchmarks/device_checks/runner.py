"""Checks one after the other within a budget of time, each reported as soon as it is done."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from featdistill.atomic import write_json
from featdistill.models.weights import first_line


class Skip(Exception):
    """Raised by a part that means nothing on this machine; says why."""


@dataclass
class Bench:
    """What all parts work with.

    Attributes:
        tiny: use tiny models and few steps, as on a CPU.
        folder: an empty folder.
    """

    device: torch.device
    tiny: bool
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def half(self) -> str:
        """The precision with a scaler where the device has it."""
        return "fp16" if self.is_gpu else "bf16"

    @property
    def compiler(self) -> dict[str, str]:
        """Arguments of `torch.compile`; in a tiny check without generated C++, which takes minutes."""
        return {"backend": "aot_eager"} if self.tiny else {}

    def need_gpu(self) -> None:
        """Skip the part on a CPU."""
        if not self.is_gpu:
            raise Skip("needs a GPU")


@dataclass(frozen=True)
class Part:
    """One check or measurement.

    Attributes:
        seconds: what it takes on an H200, at most.
        run: returns the figures; raises where something is wrong.
    """

    name: str
    seconds: float
    run: Callable[[Bench], dict[str, Any]]


def run_parts(parts: Sequence[Part], bench: Bench, minutes: float, report: Path | None) -> list[dict]:
    """Run parts in their order, print a line for each, and return their results.

    A part that no longer fits into the time is left out, and the line says so. The report is written after
    each part, so that it holds something if the process is killed.
    """
    start, results = time.monotonic(), []
    for part in parts:
        left = 60 * minutes - (time.monotonic() - start)
        began = time.monotonic()
        result: dict[str, Any] = {"part": part.name}
        if left < (0 if bench.tiny else part.seconds):
            result |= {"status": "skipped", "why": f"takes {part.seconds:.0f} s, {left:.0f} s are left"}
        else:
            result |= _run(part, bench)
        result["seconds"] = round(time.monotonic() - began, 1)
        results.append(result)
        print(_line(result), flush=True)
        if report:
            write_json(report, bench.facts | {"parts": results})
    return results


def _run(part: Part, bench: Bench) -> dict[str, Any]:
    torch.manual_seed(0)
    try:
        return {"status": "ok", "figures": part.run(bench)}
    except Skip as reason:
        return {"status": "skipped", "why": str(reason)}
    except Exception as error:  # the other parts have to run
        return {"status": "FAILED", "why": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if bench.is_gpu:
            torch.cuda.empty_cache()


def _line(result: dict[str, Any]) -> str:
    text = result.get("why") or ", ".join(
        f"{key} {_short(value)}" for key, value in result["figures"].items()
    )
    return f"{result['status']:8}{result['part']} ({result['seconds']:.1f} s): {text}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
