"""A local S3 server, and a connection to it that is slow or breaks, for tests of object storage."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Run moto's server on this machine, and give its port; skips where moto or s3fs is missing."""
    pytest.importorskip("s3fs", reason="needs s3fs and moto[server]")
    pytest.importorskip("moto.server", reason="needs s3fs and moto[server]")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


@contextlib.contextmanager
def endpoint(port: int, key: str = "key") -> Iterator[None]:
    """Let fsspec find the server at a port, as its configuration or the environment would."""
    from fsspec.config import conf

    from featdistill import remote_files

    names = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    before, conf_before = {name: os.environ.get(name) for name in names}, conf.get("s3")
    os.environ.update(names)
    conf["s3"] = {"endpoint_url": f"http://127.0.0.1:{port}"}
    remote_files._system.cache_clear()
    try:
        yield
    finally:
        conf.pop("s3") if conf_before is None else conf.update(s3=conf_before)
        remote_files._system.cache_clear()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class Relay:
    """Passes on what clients and a server on this machine send to each other.

    Args:
        port: of the server.
        delay_s: before each request is passed on.

    Attributes:
        breaks: of this many answers, only the first `break_after` bytes are passed on.
        port: where it listens.
        requests: how many there were.
    """

    def __init__(self, port: int, delay_s: float = 0, breaks: int = 0, break_after: int = 20_000) -> None:
        self.server_port, self.delay_s, self.requests = port, delay_s, 0
        self.breaks, self.break_after, self.broken = breaks, break_after, 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.server_port))
                for socket_ in (client, server):
                    socket_.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
                threading.Thread(target=self._answers, args=(server, client), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                self.requests += 1
                time.sleep(self.delay_s)
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, server:
            while data := server.recv(1 << 16):
                with self._lock:
                    breaks = len(data) >= self.break_after and self.broken < self.breaks
                    self.broken += breaks
                client.sendall(data[: self.break_after] if breaks else data)
                if breaks:
                    client.shutdown(socket.SHUT_RDWR)
                    return
