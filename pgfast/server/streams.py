"""Server-sent events, while an answer is being made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from starlette.types import Receive, Scope, Send

from .admission import DEADLINE, late
from .http_errors import ERROR, ApiError, api_error

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect them
]


class EventStream:
    """A response of events. What goes wrong before the first one has a status of its own; later it is an event.

    Args:
        events: Yields whole events; closed in any case, which ends the work behind it.
        error_form: Form of an error event, `%b` is its JSON.
    """

    def __init__(self, events: AsyncGenerator[bytes], error_form: bytes = b"event: error\ndata: %b\n\n") -> None:
        self._events, self._error_form = events, error_form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with aclosing(self._events) as events:
            first = await anext(events)
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            try:
                await send({"type": "http.response.body", "body": first, "more_body": True})
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                last = b""
            except asyncio.CancelledError:
                deadline = scope.get(DEADLINE)
                if deadline is not None and deadline.expired():
                    with suppress(TimeoutError):  # perhaps it is the client that does not read
                        async with asyncio.timeout(0.1):
                            await self._end(self._error(late(deadline.when() or 0), scope), send)
                raise
            except Exception as error:  # noqa: BLE001 - the client is told
                last = self._error(api_error(error), scope)
            await self._end(last, send)

    def _error(self, error: ApiError, scope: Scope) -> bytes:
        scope[ERROR] = error.code
        return self._error_form % error.body()

    async def _end(self, last: bytes, send: Send) -> None:
        await send({"type": "http.response.body", "body": last})
