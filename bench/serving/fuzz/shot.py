"""One malformed request, and sending it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from ..client import Address
from ..questions import PATH

CHAT = "/v1/chat/completions"
PATHS = (PATH, f"{PATH}?stream=1", CHAT, "/v1/models", "/healthz", "/readyz", "/metrics", "/openapi.json", "/")
GIVES_UP = 0.25
"""Seconds after which a client that has sent half a request goes away."""
HUNG = 20.0
"""Seconds after which a whole request should have an answer or a closed connection."""
UNANSWERED, CLOSED, HANGING = "went away", "closed", "hung"


@dataclass(frozen=True, slots=True)
class Shot:
    """What is sent."""

    data: bytes
    whole: bool = True
    """A server that reads this has no reason to wait for more."""
    end: Literal["read", "half", "close"] = "read"
    """Then: wait for the answer, end the sending side and wait, or go away at once."""


Kind = Callable[[Random], Shot]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came back."""

    kind: str
    result: str
    """Status, or one of `UNANSWERED`, `CLOSED`, `HANGING`."""
    seconds: float
    body: bytes = b""


def post(
    body: bytes,
    content_type: str | None = "application/json",
    path: str = PATH,
    headers: bytes = b"",
    length: int | None = None,
) -> bytes:
    """Return a POST request; without `length` the right one is said."""
    kind = f"Content-Type: {content_type}\r\n".encode() if content_type is not None else b""
    size = len(body) if length is None else length
    return b"POST %s HTTP/1.1\r\nHost: a\r\n%s%sContent-Length: %d\r\n\r\n%s" % (path.encode(), kind, headers, size, body)


async def fire(address: Address, kind: str, shot: Shot) -> Outcome:
    """Send a shot on a connection of its own and see what comes back."""
    start = time.perf_counter()
    result, body = CLOSED, b""
    try:
        reader, writer = await asyncio.open_connection(*address, limit=2**20)
    except OSError:
        return Outcome(kind, CLOSED, time.perf_counter() - start)
    try:
        patience = HUNG if shot.whole or shot.end == "half" else GIVES_UP
        async with asyncio.timeout(patience):
            with contextlib.suppress(OSError):  # the server may refuse before it has read everything
                writer.write(shot.data)
                await writer.drain()
                if shot.end == "half":
                    writer.write_eof()
            if shot.end == "close":
                result = UNANSWERED
            else:
                status, body = await _response(reader)
                result = status or CLOSED
    except TimeoutError:
        result = HANGING if shot.whole or shot.end == "half" else UNANSWERED
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        result = CLOSED
    finally:
        writer.transport.abort()
    return Outcome(kind, result, time.perf_counter() - start, body)


async def _response(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """The first response: its status and its body, up to the end of the connection where no length is said."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = head[9:12].decode("latin-1")
    if status == "100":
        return await _response(reader)
    lower = head.lower()
    if b"\r\ntransfer-encoding: chunked" in lower:
        body = b""
        while size := int((await reader.readline()).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
        return status, body
    length = lower.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
    return status, await reader.readexactly(int(length)) if length else await reader.read(2**20)
