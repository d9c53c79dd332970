"""Listens, and stops without losing a request: uvicorn around `Service`."""

import asyncio
import contextlib
import logging
import signal
import socket
from argparse import Namespace
from weakref import WeakKeyDictionary

import uvicorn

from featdistill.command_line import UserError, explained
from featdistill.inference.detector import Detector
from featdistill.inference.flags import load_settings
from featdistill.service.app import Service
from featdistill.service.flags import Limits
from featdistill.service.logs import show_json_lines

_log = logging.getLogger(__name__)

# Connections at a time, also of clients that do not send anything; more get 503.
_CONNECTIONS = 2048
# Answers that are due at the same moment as the end of their time still have to be sent.
_GRACE_S = 5
# For the headers of a request: uvicorn alone would wait for ever.
_HEADERS_S = 10


def serve(args: Namespace, limits: Limits, key: str) -> None:
    """Answer requests until SIGTERM or SIGINT; then finish those that were accepted.

    Raises:
        UserError: the port is in use, or the experts cannot be loaded.
    """
    show_json_lines()
    # A service manager may stop the process while it loads.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with bind(args.host, args.port) as listener:
        detector = Detector.load(*args.experts, calibrator=args.calibrator, **load_settings(args))
        _allow_files(2 * _CONNECTIONS)
        with Service(detector, limits, key) as service:
            server = Server(service)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, server.handle_exit)
            try:
                server.run(sockets=[listener])
            except OSError as error:
                raise _in_use(args.host, args.port, error) from error


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that does not listen yet: nobody should connect while experts are loaded.

    Raises:
        UserError: the address is in use, or not of this machine.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _in_use(host, port, error) from error
    return listener


def _in_use(host: str, port: int, error: OSError) -> UserError:
    return UserError(f"cannot listen on {host}:{port}: {explained(error)}; choose another --port or --host")


class Server(uvicorn.Server):
    """uvicorn's server, which closes connections that do not become requests, and stops with status 0."""

    def __init__(self, service: Service) -> None:
        config = uvicorn.Config(
            service.app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=int(service.limits.timeout) + _GRACE_S,
        )
        super().__init__(config)
        self._service = service
        # Connection -> its latest request, and since when no other has come.
        self._idle: WeakKeyDictionary[asyncio.Protocol, tuple[object, float]] = WeakKeyDictionary()

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:
        # uvicorn would raise the signal again after a graceful stop; `serve` handles signals.
        return contextlib.nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        host, port = sockets[0].getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        _log.info("listening", extra={"figures": {"url": url}})

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._close_idle(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.is_stopping = True
        _log.info("stopping", extra={"figures": {"running": len(self.server_state.tasks)}})
        await super().shutdown(sockets=sockets)
        _log.info("stopped")

    def _close_idle(self, now: float) -> None:
        for connection in list(self.server_state.connections):
            request = connection.cycle
            latest, since = self._idle.get(connection, (None, now))
            is_running = request is not None and not request.response_complete
            if is_running or request is not latest:
                since = now
            self._idle[connection] = (request, since)
            if now - since > _HEADERS_S:
                connection.transport.abort()


def _allow_files(count: int) -> None:
    """Raise the limit of open files, of which every connection is one, as far as the system permits."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        if resource.RLIM_INFINITY != soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
