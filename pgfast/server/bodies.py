"""Bodies of requests: read within limits; forms; pictures that are written as text."""

from __future__ import annotations

import asyncio
import binascii
import re
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from .http_errors import ApiError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

SMALL = 2**17
"""Bytes that are parsed in the event loop: going to a thread and back would take longer."""
SLICE = 2**20
"""Characters of base64 between two moments in which other threads may go on."""
DATA_URI = re.compile(r"data:(?:image/[\w.+-]+|application/octet-stream)?(?:;[\w=.+-]+)*;base64,", re.ASCII)


async def read_body(request: Request, limit: int) -> bytes:
    """Read a request's body.

    Args:
        request: Its headers are read, nothing else yet.
        limit: Bytes; what is beyond stays unread.

    Raises:
        ApiError: 413, if it is too long or says that it will be.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large(limit)
    message = await request.receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        parts = bytearray(body)
        while message.get("more_body"):
            if len(parts) > limit:
                raise too_large(limit)
            message = await request.receive()
            parts += message.get("body", b"")
        body = bytes(parts)
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    if len(body) > limit:
        raise too_large(limit)
    return body


def too_large(limit: int) -> ApiError:
    """The error for a body over the limit."""
    return ApiError(413, "body_too_large", f"the body is larger than {limit:,} bytes")


async def off_loop(size: int, work: Callable[..., T], *args: Any) -> T:
    """Do work on `size` bytes: in the event loop when it is little, else in a thread."""
    return work(*args) if size <= SMALL else await asyncio.to_thread(work, *args)


def parse_json(model: type[M], body: bytes) -> M:
    """Read JSON into a pydantic model.

    Raises:
        ApiError: 400 with the first thing that is wrong.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None


def invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong, as one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:100]
    line = f"{where}: {first['msg']}" if where else first["msg"]
    return ApiError(400, "invalid_request", _printable(line), param=_printable(where) or None)


def decode_picture(text: str) -> bytes:
    """Bytes of a picture file from base64, with or without `data:image/png;base64,` before it.

    Raises:
        ApiError: 400, if it is neither.
    """
    start = 0
    if text.startswith("data:"):
        match = DATA_URI.match(text[:200])
        if match is None:
            raise ApiError(400, "image_error", "a data URI of a picture starts with data:image/...;base64,", param="image")
        start = match.end()
    try:
        # in slices: the conversion keeps all other threads waiting
        parts = [binascii.a2b_base64(text[i : i + SLICE], strict_mode=True) for i in range(start, len(text), SLICE)]
    except ValueError:
        message = "the picture is neither base64 nor a data URI (data:image/png;base64,...)"
        raise ApiError(400, "image_error", message, param="image") from None
    return b"".join(parts)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:300]
