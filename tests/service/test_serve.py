"""The command: what it refuses, and how it stops."""

import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import urllib.request

import pytest
from processes import fork, needs_fork, statuses
from service_clients import picture, until
from tiny_experts import save_tiny_expert

from featdistill.__main__ import serve
from featdistill.command_line import UserError

KEY = "FEATDISTILL_API_KEY"


@pytest.mark.parametrize(
    ("flags", "key", "message"),
    [
        (["--host", "0.0.0.0"], "", f"set a key in the environment variable {KEY}"),
        (["--host", "example"], "", "everyone who can reach example"),
        ([], "short", "at least 16 characters"),
        (["--queue", "8"], "", "too short for a request of --max-images 16"),
        (["--max-mb", "600"], "", "--max-held-mb 512 is less than --max-mb 600"),
        (["--port", "70000"], "", "--port"),
        (["--experts", "nowhere"], "", "nowhere"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(monkeypatch, flags, key, message):
    monkeypatch.setenv(KEY, key)
    with pytest.raises(UserError, match=message) as refused:
        serve(["--experts", "missing", "--port", "0", *flags][2 * ("--experts" in flags) :])
    assert "\n" not in str(refused.value)


def test_missing_packages_are_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(UserError, match="needs the package uvicorn; run pip install uvicorn"):
        serve(["--experts", "missing"])


def test_a_port_in_use_is_reported_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            serve(["--experts", "missing", "--port", str(port)])


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_what_was_accepted(tmp_path, number):
    expert, log = save_tiny_expert(tmp_path / "expert"), tmp_path / "log"

    def task():
        sys.stdout = log.open("w")
        # A batch waits for a second: the signal comes meanwhile.
        serve(["--experts", expert, "--device", "cpu", "--port", "0", "--wait-ms", "1000"])

    (process,) = fork(task)
    lines = lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []  # noqa: E731
    until(lambda: any(line["event"] == "listening" for line in lines()), 60)
    url = lines()[0]["url"]
    request = urllib.request.Request(f"{url}/v1/detect", picture(), {"Content-Type": "image/png"})
    answers = []
    client = threading.Thread(target=lambda: answers.append(urllib.request.urlopen(request, timeout=30)))
    client.start()
    until(lambda: b"featdistill_queued_images 1.0" in urllib.request.urlopen(f"{url}/metrics").read())
    os.kill(process.pid, number)
    client.join(30)
    assert statuses([process]) == [0]
    assert json.load(answers[0])["images"][0]["score"] > 0
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{url}/healthz", timeout=5)
    assert [line["event"] for line in lines()] == ["listening", "stopping", "request", "stopped"]
    entry = lines()[2]
    assert (entry["status"], entry["images"]) == (200, 1)
    assert {*entry} == {"time", "level", "event", "id", "status", "images", "bytes", "ms"}
