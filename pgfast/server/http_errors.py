"""Every error that a client sees: one class, one JSON shape, a stable code.

| status | code | when |
|---|---|---|
| 400 | invalid_request | the body is not what the schema says |
| 400 | image_error, prompt_error, input_error | the picture, the text, an option cannot be used |
| 401 | invalid_api_key | no key, or a wrong one |
| 403 | origin_not_allowed | a web page of another site asks |
| 404, 405, 415 | not_found, method_not_allowed, unsupported_media_type | |
| 413 | body_too_large | |
| 429 | overloaded | too much is waiting; Retry-After says when |
| 500 | internal_error | a fault of the server |
| 503 | not_ready, draining | starting or stopping; Retry-After says when |
| 504 | timeout | not done in time |
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from pgfast.errors import ImageError, InputError, OverloadedError, PromptError

CODES = {404: "not_found", 405: "method_not_allowed"}


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

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that belong to the body."""
        found = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.body()))]
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
        return ApiError(error.status_code, CODES.get(error.status_code, "invalid_request"), _phrase(error.status_code))
    return ApiError(500, "internal_error", "the server failed; its log says why")


def error_response(error: ApiError) -> Response:
    """The error as a response of Starlette."""
    response = Response(error.body(), error.status)
    response.raw_headers = error.headers()
    return response


def handle_error(_request: Request, error: Exception) -> Response:
    """Starlette's exception handler."""
    response = error_response(api_error(error))
    if isinstance(error, HTTPException) and error.headers:  # Allow
        response.raw_headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    return response


HANDLERS: dict[Any, Any] = dict.fromkeys((ApiError, InputError, OverloadedError, HTTPException, Exception), handle_error)


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase.lower()
