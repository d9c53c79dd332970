"""What a request carries: one image, a form of files, or JSON with base64; read within the limits."""

import base64
import json
from collections.abc import AsyncIterator
from typing import NamedTuple

from python_multipart.exceptions import FormParserError
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from featdistill.images.reading import BrokenImage
from featdistill.service.flags import Limits

_LONGEST_NAME = 1000
FORM, JSON, _BYTES = "multipart/form-data", "application/json", "application/octet-stream"


class Refused(Exception):
    """A request that is not answered as it wishes: HTTP status, and why in one line."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers or {}


class Upload(NamedTuple):
    """An image of a request: its bytes, or why there are none, and what the client calls it, if anything.

    A body that is an image has no name, and in `read_form` and `parse_json` it is "" where it was left out.
    """

    name: str | None
    data: bytes | BrokenImage


def kind_of(request: Request, limits: Limits) -> str:
    """Return the media type of a request's body, by its headers.

    Raises:
        Refused: 413 if the body is too large, 415 if it is of another type.
    """
    if int(request.headers.get("content-length", 0)) > limits.max_bytes:
        raise too_large(limits)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (FORM, JSON, _BYTES) and not kind.startswith("image/"):
        what = f"Content-Type {kind} is not supported" if kind else "there is no Content-Type"
        raise Refused(415, f"{what}; send image/*, {FORM} or {JSON}")
    return kind


def too_large(limits: Limits) -> Refused:
    return Refused(413, f"the request has more than {limits.max_mb:g} MB")


async def read_form(request: Request, chunks: AsyncIterator[bytes], limits: Limits) -> list[Upload]:
    """Return the files of a form; they are kept in memory."""
    parser = MultiPartParser(request.headers, chunks, max_files=limits.max_images, max_fields=0)
    parser.spool_max_size = limits.max_bytes
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError) as error:
        reason = str(error)
        raise Refused(413 if "Too many files" in reason else 400, reason) from error
    files = [file for _, file in form.multi_items()]
    uploads = [Upload((file.filename or "")[:_LONGEST_NAME], await file.read()) for file in files]
    await form.close()
    return _some(uploads)


def parse_json(body: bytes, limits: Limits) -> list[Upload]:
    """Return the images of `{"images": [{"name": ..., "data": base64}, ...]}`; names may be left out."""
    try:
        images = json.loads(body)["images"]
        uploads = [(image.get("name", ""), image["data"]) for image in images]
        is_text = all(isinstance(text, str) for upload in uploads for text in upload)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        is_text = False
    if not is_text:
        raise Refused(400, 'the JSON must be {"images": [{"name": "...", "data": "base64"}, ...]}')
    if len(uploads) > limits.max_images:
        raise Refused(
            413, f"{len(uploads)} images are more than the limit of {limits.max_images} per request"
        )
    return _some([Upload(name[:_LONGEST_NAME], _decoded(data)) for name, data in uploads])


def _decoded(data: str) -> bytes | BrokenImage:
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        return BrokenImage(f"its data is not base64: {error}")


def _some(uploads: list[Upload]) -> list[Upload]:
    if not uploads:
        raise Refused(400, "the request has no images")
    return uploads
