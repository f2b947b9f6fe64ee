"""Every error of the server, for the schema: status, code, when it happens."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

ERRORS: dict[int, dict[str, str]] = {
    400: {
        "invalid_http": "What came is not HTTP/1.1.",
        "invalid_request": "The body is not what the schema says.",
        "image_error": "The picture cannot be used: not a picture, damaged, too large, not to be fetched.",
        "prompt_error": "The text cannot be used: empty, too long, or it holds a marker of the model itself.",
        "input_error": "An option is out of range.",
    },
    401: {"invalid_api_key": "No API key, or a wrong one."},
    403: {"origin_not_allowed": "A web page of another site asks, and the server was not told to allow that."},
    404: {
        "not_found": "Nothing is at this path.",
        "model_not_found": "Another model than the one that runs here was asked for.",
    },
    405: {"method_not_allowed": "The path has other methods; `Allow` names them."},
    408: {"head_timeout": "The request's head did not arrive in time."},
    413: {"body_too_large": "The body is larger than the server accepts."},
    415: {"unsupported_media_type": "The body has a type that is not accepted here."},
    429: {"overloaded": "Too many requests are waiting."},
    431: {"head_too_large": "The request's head is larger than the server accepts."},
    500: {"internal_error": "A fault of the server; its log says more."},
    503: {
        "not_ready": "The server is starting.",
        "draining": "The server is stopping: it finishes what it has begun.",
        "too_many_connections": "Too many connections are open.",
    },
    504: {"timeout": "The request was not done in time."},
}

EVERYWHERE = (400, 408, 431, 500, 503)
"""Possible on every path."""

_RETRY = {
    "description": "Seconds after which another try makes sense.",
    "schema": {"type": "integer", "minimum": 1},
}
_HEADERS = {
    401: {"WWW-Authenticate": {"description": "Bearer.", "schema": {"type": "string"}}},
    405: {"Allow": {"description": "The methods.", "schema": {"type": "string"}}},
    429: {"Retry-After": _RETRY},
    503: {"Retry-After": _RETRY},
}


def name_of(status: int) -> str:
    """Name of a response component, for example `TooManyRequests`."""
    return HTTPStatus(status).phrase.title().replace(" ", "").replace("-", "")


def references(*statuses: int) -> dict[str, Any]:
    """The responses of an operation that can fail so."""
    return {str(status): {"$ref": f"#/components/responses/{name_of(status)}"} for status in sorted({*EVERYWHERE, *statuses})}


def responses() -> dict[str, Any]:
    """The response components."""
    return {name_of(status): _response(status, codes) for status, codes in ERRORS.items()}


def _response(status: int, codes: dict[str, str]) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    narrowed = {"properties": {"error": {"properties": {"type": {"const": kind}, "code": {"enum": list(codes)}}}}}
    examples = {
        code: {"summary": when, "value": {"error": {"message": when, "type": kind, "code": code, "param": None}}}
        for code, when in codes.items()
    }
    schema = {"allOf": [{"$ref": "#/components/schemas/ErrorBody"}, narrowed]}
    lines = "\n".join(f"- `{code}`: {when}" for code, when in codes.items())
    found: dict[str, Any] = {"description": lines, "content": {"application/json": {"schema": schema, "examples": examples}}}
    return found | ({"headers": _HEADERS[status]} if status in _HEADERS else {})
