"""The answers of the service: `/v1/detect`, and what operators ask for."""

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from featdistill import __version__
from featdistill.images.reading import BrokenImage, TooManyPixels, encode_jpeg
from featdistill.inference.detector import Detection, Detector, Prepared
from featdistill.service import bodies
from featdistill.service.batching import Batcher
from featdistill.service.bodies import Refused, Upload
from featdistill.service.flags import Limits
from featdistill.service.metrics import Metrics

_log = logging.getLogger(__name__)

# As nginx logs a request whose client left.
_CLIENT_LEFT = 499
# A client that is still sending reads no answer: for so long, what it sends is thrown away.
_DISCARD_S = 10.0


@dataclass
class _Entry:
    """What is known of a request: to be logged, and what it occupies."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    start: float = field(default_factory=time.monotonic)
    images: int = 0
    bytes: int = 0
    held: int = 0
    queued: int = 0
    is_read: bool = False


class _EarlyAnswer(JSONResponse):
    """An answer to a client that has not sent all of its request; then the connection ends."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*self.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_S):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body"})


class Service:
    """Answers requests with a detector; a context manager that ends its threads.

    Args:
        detector: without stability and credentials.
        key: what requests must carry, except those for health; "" if nothing.
    """

    def __init__(self, detector: Detector, limits: Limits, key: str = "") -> None:
        self.detector, self.limits, self._key = detector, limits, key.encode()
        self.is_stopping = False
        self._queued = self._held = 0
        self.metrics = Metrics(lambda: self._queued, lambda: self._held, lambda: not self.why_not_ready())
        self._decoders = ThreadPoolExecutor(limits.decoders, "decoding")
        self._batcher = Batcher(detector, limits.wait_ms / 1000, self.metrics.batch)
        gray = encode_jpeg(np.full((64, 64, 3), 128, np.uint8), 90)
        self._first = self._batcher.submit(detector.prepare(gray))
        self.app = FastAPI(title="FeatDistill", openapi_url=None, redirect_slashes=False)
        self.app.add_exception_handler(Refused, self._refuse)
        self.app.add_exception_handler(HTTPException, self._refuse)
        self.app.add_api_route("/v1/detect", self.detect, methods=["POST"])
        for path, endpoint in (
            ("/v1/info", self.info),
            ("/metrics", self.figures),
            ("/healthz", self.health),
            ("/readyz", self.readiness),
        ):
            self.app.add_api_route(path, endpoint, methods=["GET"])

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._batcher.stop(self.limits.timeout)

    def why_not_ready(self) -> str | None:
        """Return why no requests should be sent here now, or None."""
        if self.is_stopping:
            return "stopping"
        if not self._first.done():
            return "warming up"
        return "the first image could not be scored" if self._first.exception() else self._batcher.problem()

    async def health(self) -> Response:
        """Say whether the process works; where it does not, it should be restarted."""
        return _state(self._batcher.problem())

    async def readiness(self) -> Response:
        """Say whether requests should be sent here."""
        return _state(self.why_not_ready())

    async def info(self, request: Request) -> Response:
        """Say what decides the scores, what the verdicts promise, and the limits."""
        self._authorize(request)
        calibrator = self.detector.calibrator
        promise = calibrator.promise() if calibrator else None
        about = {"version": __version__, "promise": promise, "limits": vars(self.limits)}
        return JSONResponse(about | self._describe())

    async def figures(self, request: Request) -> Response:
        """Return figures for Prometheus."""
        self._authorize(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def detect(self, request: Request) -> Response:
        """Score the images of a request; count and log it."""
        entry = _Entry()
        try:
            response = await self._answer(request, entry)
        except Refused as error:
            response = _refusal(error, JSONResponse if entry.is_read else _EarlyAnswer)
        except ClientDisconnect:
            response = Response(status_code=_CLIENT_LEFT)
        except Exception:
            _log.exception("unexpected error", extra={"figures": {"id": entry.id}})
            error = Refused(500, f"unexpected error; the log has it under {entry.id}")
            response = _refusal(error, JSONResponse if entry.is_read else _EarlyAnswer)
        finally:
            self._release(entry)
            self._queued -= entry.queued
        seconds = time.monotonic() - entry.start
        self.metrics.request(response.status_code, seconds)
        figures = {"id": entry.id, "status": response.status_code, "images": entry.images}
        figures |= {"bytes": entry.bytes, "ms": round(1000 * seconds, 1)}
        _log.info("request", extra={"figures": figures})
        response.headers["X-Request-ID"] = entry.id
        return response

    async def _refuse(self, _: Request, error: Refused | HTTPException) -> JSONResponse:
        """Answer what `detect` does not: no key, no such path, or not with this method."""
        if isinstance(error, HTTPException):
            error = Refused(error.status_code, error.detail, error.headers)
        self.metrics.refused(error.status)
        return _refusal(error)

    def _describe(self) -> dict[str, Any]:
        """Return what decides the scores, without the experts' folders, which tell of this machine."""
        about = self.detector.describe()
        for expert in about["experts"].values():
            del expert["folder"]
        return about

    def _authorize(self, request: Request) -> None:
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = request.headers.get("x-api-key", bearer).encode("latin-1")
        if self._key and not hmac.compare_digest(given, self._key):
            message = "send the key as Authorization: Bearer KEY, or as X-API-Key"
            raise Refused(401, message, {"WWW-Authenticate": "Bearer"})

    async def _answer(self, request: Request, entry: _Entry) -> Response:
        self._authorize(request)
        self._check_queue(1)
        kind = bodies.kind_of(request, self.limits)
        end = entry.start + self.limits.timeout
        try:
            async with asyncio.timeout_at(end):
                uploads = await self._read(request, entry, kind)
        except TimeoutError:
            raise Refused(408, f"the request did not arrive within {self.limits.timeout:g} s") from None
        self._check_queue(len(uploads))
        entry.images = entry.queued = len(uploads)
        self._queued += entry.queued
        rows = await self._before_client_leaves(request, self._rows(uploads, entry), end)
        broken = sum(row.error is not None for row in rows)
        self.metrics.images(len(rows) - broken, broken)
        return JSONResponse({"images": [row.as_dict() for row in rows], **self._describe()})

    async def _read(self, request: Request, entry: _Entry, kind: str) -> list[Upload]:
        async with aclosing(self._chunks(request, entry)) as chunks:
            if kind == bodies.FORM:
                return await bodies.read_form(request, chunks, self.limits)
            body = b"".join([chunk async for chunk in chunks])
        if kind == bodies.JSON:
            return await self._in_thread(bodies.parse_json, body, self.limits)
        if not body:
            raise Refused(400, "the request is empty")
        return [Upload(None, body)]

    async def _chunks(self, request: Request, entry: _Entry) -> AsyncIterator[bytes]:
        """Yield the body in pieces and count them: one of unknown length may never end."""
        async for chunk in request.stream():
            entry.bytes += len(chunk)
            if entry.bytes > self.limits.max_bytes:
                raise bodies.too_large(self.limits)
            if self._held + len(chunk) > self.limits.max_held_bytes:
                raise Refused(429, "too many bytes are waiting; try again", {"Retry-After": "1"})
            entry.held += len(chunk)
            self._held += len(chunk)
            yield chunk
        entry.is_read = True

    async def _rows(self, uploads: list[Upload], entry: _Entry) -> list[Detection]:
        """Decode images, all before the first is queued, and score those that can be."""
        names = [upload.name for upload in uploads]
        prepared = await asyncio.gather(*map(self._prepared, uploads))
        uploads.clear()
        self._release(entry)
        if names == [None] and isinstance(prepared[0], BrokenImage):
            status = 413 if isinstance(prepared[0], TooManyPixels) else 422
            raise Refused(status, f"the image could not be read: {prepared[0]}")
        scored = [
            asyncio.wrap_future(self._batcher.submit(one)) for one in prepared if isinstance(one, Prepared)
        ]
        rows = iter(await asyncio.gather(*scored))
        names = [name or f"image {number}" for number, name in enumerate(names, start=1)]
        return [
            replace(next(rows), name=name) if isinstance(one, Prepared) else Detection(name, error=str(one))
            for name, one in zip(names, prepared, strict=True)
        ]

    async def _prepared(self, upload: Upload) -> Prepared | BrokenImage:
        if isinstance(upload.data, BrokenImage):
            return upload.data
        try:
            return await self._in_thread(self.detector.prepare, upload.data, self.limits.max_pixels)
        except BrokenImage as error:
            return error

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function, *arguments)

    async def _before_client_leaves(self, request: Request, work: Coroutine, end: float) -> Any:
        """Return what work returns; stop it when the client leaves, or at a time of the loop's clock."""
        work, left = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait((work, left), timeout=end - time.monotonic(), return_when="FIRST_COMPLETED")
            if work.done():
                return work.result()
            if left.done():
                raise ClientDisconnect
            raise Refused(504, f"there was no answer within {self.limits.timeout:g} s")
        finally:
            work.cancel()
            left.cancel()

    def _check_queue(self, images: int) -> None:
        if self._queued + images > self.limits.queue:
            raise Refused(429, "too many images are waiting; try again", {"Retry-After": "1"})

    def _release(self, entry: _Entry) -> None:
        self._held -= entry.held
        entry.held = 0


def _refusal(error: Refused, kind: type[JSONResponse] = JSONResponse) -> JSONResponse:
    return kind({"error": error.reason}, error.status, error.headers)


def _state(problem: str | None) -> JSONResponse:
    return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)
