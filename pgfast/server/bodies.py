"""Bodies of requests: read within limits, refused unread, JSON, pictures that are written as text."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import SchemaValidator, core_schema
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from .http_errors import ApiError, ErrorResponse

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

READ = "pgfast.read"
"""Where a request's scope says that the whole body was read."""
SMALL = 2**17
"""Bytes that are parsed in the event loop: going to a thread and back would take longer."""
MAX_ITEMS = 2000
"""Commas in a JSON body. A picture has none; a million little values keep everybody waiting while they are made objects."""
SLICE = 2**22
"""Characters of base64 between two moments in which other threads may go on."""
BASE64 = SchemaValidator(
    core_schema.bytes_schema(), core_schema.CoreConfig(val_json_bytes="base64")
)  # binascii takes 8 times as long
DATA_URI = re.compile(r"data:(?:image/[\w.+-]+|application/octet-stream)?(?:;[\w=.+-]+)*;base64,", re.ASCII)


def announced(scope: Scope) -> float:
    """Bytes of the body to come; infinite, if that is not said."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            digits = value.strip().lstrip(b"0") or b"0"  # the parser lets both through
            return float(digits[:18]) if digits.isdigit() else math.inf
        if name == b"transfer-encoding":
            return math.inf
    return 0


def is_read(scope: Scope) -> bool:
    """Whether a request's body has been read to its end."""
    return READ in scope


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request with an error, without reading its body."""
    if any(name == b"expect" for name, _ in scope["headers"]):
        # it waits to be asked for its body; where the next request would begin is not known
        await ErrorResponse(error, [(b"connection", b"close")])(scope, receive, send)
    else:
        await ErrorResponse(error, unread=announced(scope))(scope, receive, send)


def too_large(limit: int) -> ApiError:
    """The error for a body over the limit."""
    return ApiError(413, "body_too_large", f"the body is larger than {limit:,} bytes")


async def read_body(request: Request, limit: int) -> bytes:
    """Read a request's body.

    Args:
        request: Its headers are read, nothing else yet.
        limit: Bytes; what is beyond stays unread.

    Raises:
        ApiError: 413, if it is longer.
    """
    message = await request.receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        parts = bytearray(body)
        while message.get("more_body") and len(parts) <= limit:
            message = await request.receive()
            parts += message.get("body", b"")
        body = bytes(parts)
    if message["type"] == "http.disconnect":
        raise ApiError(400, "invalid_request", "the body ends before its end")  # nobody is there to read it
    if not message.get("more_body"):
        request.scope[READ] = True
    if len(body) > limit:
        raise too_large(limit)
    return body


async def off_loop(size: int, work: Callable[..., T], *args: Any) -> T:
    """Do work on `size` bytes: in the event loop when it is little, else in a thread."""
    return work(*args) if size <= SMALL else await asyncio.to_thread(work, *args)


def parse_json(model: type[M], body: bytes) -> M:
    """Read JSON into a pydantic model.

    Raises:
        ApiError: 400 with the first thing that is wrong.
    """
    at = -1
    for _ in range(MAX_ITEMS):  # `count` would look at each byte by itself
        at = body.find(b",", at + 1)
        if at < 0:
            break
    else:
        raise ApiError(400, "invalid_request", f"the JSON has more than {MAX_ITEMS:,} items")
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
        parts: list[bytes] = [BASE64.validate_strings(cast("Any", text[i : i + SLICE])) for i in range(start, len(text), SLICE)]
    except ValidationError:
        message = "the picture is neither base64 nor a data URI (data:image/png;base64,...)"
        raise ApiError(400, "image_error", message, param="image") from None
    return b"".join(parts)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:300]
