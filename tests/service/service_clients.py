"""A service in a thread of the test, with a tiny expert, and plain HTTP clients for it."""

import base64
import contextlib
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from featdistill.service.app import Service
from featdistill.service.flags import Limits
from featdistill.service.server import Server, bind


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    content: dict


class Running(NamedTuple):
    service: Service
    server: Server
    port: int

    def post(self, body=None, kind="image/png", timeout=30.0, path="/v1/detect", **headers) -> Answer:
        return self.request("POST", path, body, {"Content-Type": kind, **headers}, timeout)

    def get(self, path: str, **headers) -> Answer:
        return self.request("GET", path, None, headers)

    def request(self, method, path, body, headers, timeout=30.0) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(
                method, path, body, {key.replace("_", "-"): text for key, text in headers.items()}
            )
            answer = connection.getresponse()
            data, kind = answer.read(), answer.headers.get("content-type", "")
            content = json.loads(data) if "json" in kind else data.decode()
            return Answer(answer.status, dict(answer.headers), content)

    def metric(self, line: str) -> float:
        """Return the value of a line of /metrics; 0 if it is not there."""
        lines = dict(text.rsplit(" ", 1) for text in self.service.metrics.text().decode().splitlines())
        return float(lines.get(line, 0))


@contextlib.contextmanager
def serving(detector, key="", **limits) -> Iterator[Running]:
    """Serve on a free port of the loopback until the block ends."""
    with bind("127.0.0.1", 0) as listener, Service(detector, Limits(**limits), key) as service:
        server = Server(service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started and service._first.done())
        yield Running(service, server, listener.getsockname()[1])
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(condition, timeout_s: float = 20.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def picture(seed: int = 0, side: int = 48) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return png(Image.fromarray(pixels))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def form(*files: tuple[str, bytes]) -> tuple[bytes, str]:
    """Return the body and the type of a form with these files."""
    parts = [
        b'--XX\r\nContent-Disposition: form-data; name="f"; filename="%s"\r\n\r\n%s\r\n'
        % (name.encode(), data)
        for name, data in files
    ]
    return b"".join(parts) + b"--XX--\r\n", "multipart/form-data; boundary=XX"


def as_base64(*images: tuple[str, bytes]) -> bytes:
    rows = [{"name": name, "data": base64.b64encode(data).decode()} for name, data in images]
    return json.dumps({"images": rows}).encode()
