"""Every error that a client sees: one class, one JSON shape, a stable code.

| status | code | when |
|---|---|---|
| 400 | invalid_http | what came is not HTTP |
| 400 | invalid_request | the body is not what the schema says |
| 400 | image_error, prompt_error, input_error | the picture, the text, an option cannot be used |
| 401 | invalid_api_key | no key, or a wrong one |
| 403 | origin_not_allowed | a web page of another site asks |
| 404, 405, 415 | not_found, method_not_allowed, unsupported_media_type | |
| 413 | body_too_large | |
| 408, 431 | head_timeout, head_too_large | the request's head came too slowly, or is too long |
| 429 | overloaded | too much is waiting; Retry-After says when |
| 500 | internal_error | a fault of the server |
| 503 | not_ready, draining, too_many_connections | starting or stopping; Retry-After says when |
| 504 | timeout | not done in time |
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from pgfast.errors import ImageError, InputError, OverloadedError, PgfastError, PromptError

logger = logging.getLogger(__name__)

CODES = {404: "not_found", 405: "method_not_allowed"}
ERROR = "pgfast.error"
"""Where a request's scope keeps the code of its error, for the metrics."""
DISCARDED = 2**20
"""Bytes of a refused request that are taken in and thrown away, because a new connection would cost more."""
LINGER, LINGER_BYTES = 1.0, 2**23
"""Seconds and bytes in which a client that still sends may notice the refusal, before the connection is cut."""


class ApiError(Exception):
    """What a client is told.

    Args:
        status: HTTP status.
        code: Stable word for programs, see the table above.
        message: One line for people.
        retry_after: Seconds after which another try makes sense.
        param: Which field of the request is meant.
    """

    def __init__(
        self, status: int, code: str, message: str, *, retry_after: int | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after, self.param = status, code, message, retry_after, param

    def body(self) -> bytes:
        """The JSON of the error, in OpenAI's shape."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "code": self.code, "param": self.param}
        return json.dumps({"error": error}).encode()

    def headers(self, body: bytes) -> list[tuple[bytes, bytes]]:
        """Headers that belong to the body."""
        found = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if self.retry_after is not None:
            found.append((b"retry-after", b"%d" % self.retry_after))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        return found


def api_error(error: BaseException) -> ApiError:
    """Say what an exception means to a client; what is nobody's mistake out there becomes a 500 without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OverloadedError):
        return ApiError(429, "overloaded", str(error), retry_after=1)
    for kind, code in ((ImageError, "image_error"), (PromptError, "prompt_error"), (InputError, "input_error")):
        if isinstance(error, kind):
            return ApiError(400, code, str(error))
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase.lower()
        return ApiError(error.status_code, CODES.get(error.status_code, "invalid_request"), phrase)
    # one line for what the engine says itself; anything else is a bug, and whoever looks for it needs all
    logger.error("a request failed: %s", error, exc_info=None if isinstance(error, PgfastError) else error)
    return ApiError(500, "internal_error", "the server failed; its log says why")


class ErrorResponse:
    """An error as a response.

    Args:
        error: What to say.
        more: Further headers.
        unread: Bytes of the request's body that nobody has read and nobody will.
    """

    def __init__(self, error: ApiError, more: list[tuple[bytes, bytes]] | None = None, *, unread: float = 0) -> None:
        self._error, self._more, self._unread = error, more or [], unread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; a client that has much more to say is cut off, after a moment in which it can read the answer."""
        scope[ERROR] = self._error.code
        body = self._error.body()
        headers = self._error.headers(body) + self._more
        close = self._unread > DISCARDED
        if close:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": self._error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": close})
        if close:
            await _throw_away(receive)
            await send({"type": "http.response.body", "body": b""})


async def _throw_away(receive: Receive) -> None:
    # a connection that is closed with unread bytes is reset, and the client may never see the answer
    size, more = 0, True
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while more and size < LINGER_BYTES:
                message = await receive()
                size, more = size + len(message.get("body", b"")), message.get("more_body", False)


async def handle_error(_request: Any, error: Exception) -> ErrorResponse:
    """Starlette's exception handler."""
    more = None
    if isinstance(error, HTTPException) and error.headers:  # Allow
        more = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    found = api_error(error)
    return ErrorResponse(found, more, unread=math.inf if found.status == 413 else 0)


HANDLERS: dict[Any, Any] = {HTTPException: handle_error, ApiError: handle_error, PgfastError: handle_error}
