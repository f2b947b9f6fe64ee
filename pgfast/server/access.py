"""API keys, and pages of other sites."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgfast.errors import InputError

from .bodies import refuse
from .config import ServerConfig
from .http_errors import ApiError

HARMLESS = frozenset(("GET", "HEAD", "OPTIONS"))
"""Methods that change nothing and cost little; what they return is kept from other sites by the browser."""
PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, content-type"),
    (b"access-control-max-age", b"600"),
    (b"content-length", b"0"),
]


def read_keys(path: str | Path) -> tuple[str, ...]:
    """Read a file of API keys: one per line, `#` starts a comment line.

    Raises:
        InputError: It cannot be read, or holds no key. No key is ever part of the message.
    """
    try:
        lines = Path(path).read_text("ascii").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not plain ASCII text"
        raise InputError(f"the key file {path} cannot be read: {reason}") from error
    keys = [
        (number, line.strip()) for number, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")
    ]
    for number, key in keys:
        if not all("!" <= char <= "~" for char in key):
            raise InputError(f"the key file {path}, line {number}: a key has no spaces and no control characters")
    if not keys:
        raise InputError(f"the key file {path} has no keys: one per line is needed")
    return tuple(key for _, key in keys)


class Access:
    """Middleware: who may ask.

    Args:
        app: What is inside.
        config: Keys and origins.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        # hashes, so that all are equally long and their comparison says nothing
        self._keys = [_hash(key.encode()) for key in config.api_keys]
        self._origins = frozenset(origin.encode() for origin in config.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None:
            if origin in self._origins:
                send = _with_cors(send, origin)
                if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                    await send({"type": "http.response.start", "status": 204, "headers": PREFLIGHT})
                    return await send({"type": "http.response.body"})
            elif scope["method"] not in HARMLESS and not _same_site(origin, headers.get(b"host", b"")):
                error = ApiError(403, "origin_not_allowed", "pages of other sites may not ask here: see --cors-origin")
                return await refuse(error, scope, receive, send)
        if self._keys and _is_protected(scope["path"]) and not self._is_known(headers.get(b"authorization", b"")):
            error = ApiError(401, "invalid_api_key", "a valid API key is needed: Authorization: Bearer KEY")
            return await refuse(error, scope, receive, send)
        await self._app(scope, receive, send)

    def _is_known(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        given, found = _hash(key.strip()), False
        for known in self._keys:  # always all of them
            found |= hmac.compare_digest(given, known)
        return found and scheme.lower() == b"bearer"


def _is_protected(path: str) -> bool:
    return path == "/metrics" or path.startswith("/v1/")


def _same_site(origin: bytes, host: bytes) -> bool:
    """Whether the page came from this server; the scheme may differ, because a proxy may speak TLS for it."""
    scheme, _, place = origin.lower().partition(b"://")
    return place != b"" and place == host.lower().removesuffix(b":443" if scheme == b"https" else b":80")


def _with_cors(send: Send, origin: bytes) -> Send:
    async def cors_send(message: Message) -> None:
        if message["type"] == "http.response.start":
            more = [(b"access-control-allow-origin", origin), (b"vary", b"origin")]
            more.append((b"access-control-expose-headers", b"retry-after"))
            message["headers"] = [*message.get("headers", ()), *more]
        await send(message)

    return cors_send


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
