"""Who is let in: a bounded number of requests and bytes, each for a bounded time, and nobody while the server stops.

A request has its place from its head to the last byte of its response. It is refused before its body is read, and refusing
costs next to nothing, so that a flood of requests does not keep the admitted ones waiting.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from .bodies import announced, is_read, refuse, too_large
from .config import ServerConfig
from .http_errors import ApiError, ErrorResponse
from .metrics import STATUS

if TYPE_CHECKING:
    from .metrics import Metrics

TASKS = "pgfast.tasks"
"""Where a request's scope has the set of tasks that the connection cancels when the client goes away."""
DEADLINE = "pgfast.deadline"
"""Where a request's scope has its `asyncio.Timeout`."""


class Admission:
    """Counts places.

    Args:
        config: How many, for how long.
        slots: Questions that the decoder works on at a time.
        metrics: Counts who is refused.
    """

    def __init__(self, config: ServerConfig, slots: int, metrics: Metrics) -> None:
        self._places, self._config, self._metrics = slots + config.max_queue, config, metrics
        self.taken = self._bodies = 0
        self.ready, self.draining = True, False
        self._left: deque[float] = deque(maxlen=128)  # when the last ones left
        metrics.in_house.set_function(lambda: self.taken)

    def enter(self, size: float) -> None:
        """Take a place for a request with a body of so many bytes.

        Raises:
            ApiError: There is none: 413, 429 or 503.
        """
        error = self._refusal(size)
        if error is not None:
            self._metrics.rejected.labels(error.code).inc()
            raise error
        self.taken += 1
        self._bodies += self._weight(size)

    def leave(self, size: float) -> None:
        """Give the place back."""
        self.taken -= 1
        self._bodies -= self._weight(size)
        self._left.append(time.monotonic())

    def _refusal(self, size: float) -> ApiError | None:
        if self.draining:
            return ApiError(503, "draining", "the server is stopping", retry_after=5)
        if not self.ready:
            return ApiError(503, "not_ready", "the server is starting", retry_after=2)
        if math.isfinite(size) and size > self._config.max_body:
            return too_large(self._config.max_body)
        if self.taken >= self._places:
            return ApiError(429, "overloaded", "too many requests are waiting: try again later", retry_after=self.retry_after())
        if self._bodies + self._weight(size) > self._config.max_bodies:
            return ApiError(429, "overloaded", "too many bytes are waiting: try again later", retry_after=self.retry_after())
        return None

    def _weight(self, size: float) -> int:
        # a body of unknown length may become as long as any
        return int(min(size, self._config.max_body))

    def retry_after(self) -> int:
        """Seconds after which those that are in the house now will have left, going by the last ones."""
        if len(self._left) < 2:
            return 1
        seconds = (time.monotonic() - self._left[0]) / len(self._left)
        return max(1, min(60, math.ceil(self.taken * seconds)))


class Admit:
    """Middleware: a place and a deadline for each request to the API that works.

    Args:
        app: What is inside.
        admission: Counts.
        config: The deadline.
    """

    def __init__(self, app: ASGIApp, admission: Admission, config: ServerConfig) -> None:
        self._app, self._admission, self._timeout = app, admission, config.timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)
        size = announced(scope)
        try:
            self._admission.enter(size)
        except ApiError as error:
            return await refuse(error, scope, receive, send)
        task = asyncio.current_task()
        tasks = scope.get(TASKS, set())
        tasks.add(task)
        try:
            async with asyncio.timeout(self._timeout) as scope[DEADLINE]:
                await self._app(scope, receive, send)
        except TimeoutError:
            if not scope[DEADLINE].expired():
                raise
            await self._give_up(late(self._timeout), scope, receive, send)
        except asyncio.CancelledError:
            if task in tasks:  # the client is still there: the server stops and has waited long enough
                await self._give_up(ApiError(503, "draining", "the server is stopping", retry_after=5), scope, receive, send)
        finally:
            tasks.discard(task)
            self._admission.leave(size)

    async def _give_up(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if STATUS not in scope:
            await ErrorResponse(error, unread=0 if is_read(scope) else math.inf)(scope, receive, send)


def late(seconds: float) -> ApiError:
    """The error for a request that took too long."""
    return ApiError(504, "timeout", f"the request was not done within {seconds:g} seconds")
