"""Checks within a budget of time, each in a process of its own and reported as soon as it is done.

A part that crashes, or after which the GPU does not answer, costs only itself. The processes are forked from
one that has imported everything and must not have used the GPU.
"""

import copy
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from featdistill.atomic import write_json
from featdistill.models.weights import first_line

_PATIENCE_S = 5


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
        seconds: what it takes on an H200, as far as is known; it is stopped after three times as many.
        run: returns the figures; raises where something is wrong.
        shares: whether others may run at the same time, because its figures are not of speed.
    """

    name: str
    seconds: float
    run: Callable[[Bench], dict[str, Any]]
    shares: bool = False


@dataclass
class _Running:
    """A part's process, the end of its pipe, and the times when it began and when it is stopped."""

    part: Part
    process: multiprocessing.Process
    pipe: Connection
    began: float
    limit: float


def run_parts(
    parts: Sequence[Part],
    bench: Bench,
    minutes: float,
    report: Path | None,
    jobs: int = 1,
    before: Sequence[dict] = (),
) -> list[dict]:
    """Start parts in their order, print a line for each as it ends, and return all results.

    A part that no longer fits into the time is left out, and the line says so. The report is written after
    each part, so that it holds something if the process is killed.

    Args:
        jobs: how many parts that share the device run at the same time.
        before: results of earlier parts.
    """
    end = time.monotonic() + 60 * minutes
    waiting, running, results = list(parts), [], [*before]

    def finish(result: dict[str, Any]) -> None:
        results.append(result)
        print(_line(result), flush=True)
        if report:
            write_json(report, bench.facts | {"parts": results})

    try:
        while waiting or running:
            while waiting and _has_room(waiting[0], running, jobs):
                part, left = waiting.pop(0), max(0, end - time.monotonic())
                if not left or (left < part.seconds and not bench.tiny):
                    why = f"takes {part.seconds:.0f} s, {left:.0f} s are left"
                    finish({"part": part.name, "status": "skipped", "why": why, "seconds": 0.0})
                else:
                    running.append(_start(part, bench, end))
            nearest = min((one.limit for one in running), default=0) - time.monotonic()
            answered = wait([one.pipe for one in running], max(0, nearest))
            for one in list(running):
                if one.pipe in answered or time.monotonic() >= one.limit:
                    running.remove(one)
                    result = _result(one, bench, end)
                    finish(result | {"seconds": round(time.monotonic() - one.began, 1)})
    finally:
        _stop([one.process for one in running])
    return results


def _has_room(part: Part, running: list[_Running], jobs: int) -> bool:
    shares = part.shares and all(one.part.shares for one in running)
    return not running or (shares and len(running) < jobs)


def _start(part: Part, bench: Bench, end: float) -> _Running:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(part, bench, theirs))
    process.start()
    # Without this end, ours is at its end when the process is.
    theirs.close()
    began = time.monotonic()
    return _Running(part, process, ours, began, end if bench.tiny else min(began + 3 * part.seconds, end))


def _result(one: _Running, bench: Bench, end: float) -> dict[str, Any]:
    """Return what the process of a part has answered; stop it and all that it has started."""
    result: dict[str, Any] = {"part": one.part.name, "status": "FAILED"}
    if not one.pipe.poll():
        result["why"] = f"stopped after {time.monotonic() - one.began:.0f} s"
        if time.monotonic() >= end:
            result |= {"status": "skipped", "why": f"{result['why']}: the time is over"}
    else:
        try:
            answer, facts = one.pipe.recv()
            bench.facts |= facts
            result |= answer
        except EOFError:
            one.process.join()
            result["why"] = f"its process ended with status {one.process.exitcode}"
    _stop([one.process])
    one.process.join()
    return result


def _stop(processes: list[multiprocessing.Process]) -> None:
    """Stop processes and all that they have started; a launcher gets the time to stop its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + _PATIENCE_S
        groups = [process for process in processes if _signal(process, number)]
        for process in groups:
            process.join(max(0, end - time.monotonic()))
            while _signal(process, 0) and time.monotonic() < end:
                time.sleep(0.02)


def _signal(process: multiprocessing.Process, number: int) -> bool:
    """Send a signal to the group of a process; return whether there is one."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _run(part: Part, bench: Bench, pipe: Connection) -> None:
    """Run a part in this process, which leads a group of its own, and send its result and the new facts."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.manual_seed(0)
    bench = replace(bench, folder=bench.folder / str(os.getpid()), facts=dict(bench.facts))
    bench.folder.mkdir()
    known = copy.deepcopy(bench.facts)
    try:
        answer = {"status": "ok", "figures": part.run(bench)}
    except Skip as reason:
        answer = {"status": "skipped", "why": str(reason)}
    except Exception as error:  # the other parts have to run
        answer = {"status": "FAILED", "why": f"{type(error).__name__}: {first_line(error)}"}
    pipe.send((answer, {key: value for key, value in bench.facts.items() if value != known.get(key)}))
    pipe.close()


def _line(result: dict[str, Any]) -> str:
    text = result.get("why") or ", ".join(
        f"{key} {_short(value)}" for key, value in result["figures"].items()
    )
    return f"{result['status']:8}{result['part']} ({result['seconds']:.1f} s): {text}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
