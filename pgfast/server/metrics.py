"""What the server counts, for Prometheus; and the middleware that counts requests."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .http_errors import ERROR, ErrorResponse, api_error

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from pgfast.engine import Engine

STATUS = "pgfast.status"
"""Where a request's scope keeps the status that was sent."""
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
NOSNIFF = (b"x-content-type-options", b"nosniff")


class Metrics:
    """All metrics of one server, in a registry of their own.

    Args:
        engine: Asked for its queue when somebody looks.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("pgfast_requests", "Requests by route and status.", ["route", "status"], registry=registry)
        self.errors = Counter("pgfast_errors", "Errors by kind, as in the JSON of an error.", ["kind"], registry=registry)
        self.rejected = Counter("pgfast_rejected", "Requests refused unread, by reason.", ["reason"], registry=registry)
        self.request_seconds = Histogram(
            "pgfast_request_seconds",
            "From a request's head to its response's end.",
            ["route"],
            registry=registry,
            buckets=SECONDS,
        )
        self.first_token = Histogram(
            "pgfast_time_to_first_token_seconds", "From the question to its first token.", registry=registry, buckets=SECONDS
        )
        self.later_token = Histogram(
            "pgfast_time_per_later_token_seconds", "Mean of an answer's later tokens.", registry=registry, buckets=TOKEN_SECONDS
        )
        self.batch_size = Histogram(
            "pgfast_batch_size", "Questions that share a run of the decoder.", registry=registry, buckets=ROWS
        )
        self.cache_hits = Counter("pgfast_picture_cache_hits", "Pictures found encoded.", registry=registry)
        self.cache_misses = Counter("pgfast_picture_cache_misses", "Pictures encoded.", registry=registry)
        self.cache_bytes = Gauge("pgfast_picture_cache_bytes", "Bytes of encoded pictures kept.", registry=registry)
        self.in_house = Gauge("pgfast_requests_in_house", "Requests that have a place.", registry=registry)
        for name, text, read in (
            ("pgfast_queue_length", "Questions that wait for a slot of the decoder.", lambda: engine.load_figures().waiting),
            ("pgfast_running_rows", "Questions in the running batch.", lambda: engine.load_figures().running),
            ("pgfast_slots", "Slots of the decoder.", lambda: engine.load_figures().slots),
        ):
            Gauge(name, text, registry=registry).set_function(read)
        engine.on_step = self.batch_size.observe


class CountRequests:
    """Outermost middleware: counts, adds the headers that every response has, turns a bug into a 500.

    Args:
        app: What is inside.
        metrics: Where to count.
        routes: Their paths are the labels; other paths are one label, so that strangers cannot make up new ones.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: list[BaseRoute]) -> None:
        self._app, self._metrics = app, metrics
        self._paths: dict[object, str] = {}
        for route in routes:
            path = getattr(route, "path", "other")
            self._paths |= {getattr(route, "endpoint", path): path, path: path}
        self._children: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start = time.perf_counter()

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope[STATUS] = message["status"]
                message["headers"] = [*message.get("headers", ()), NOSNIFF]
            await send(message)

        try:
            await self._app(scope, receive, counting_send)
        except Exception as error:
            if STATUS in scope:
                raise
            await ErrorResponse(api_error(error))(scope, receive, counting_send)
        finally:
            self._count(scope, time.perf_counter() - start)

    def _count(self, scope: Scope, seconds: float) -> None:
        path = self._paths.get(scope.get("endpoint")) or self._paths.get(scope["path"], "other")
        key = path, scope.get(STATUS, 499)  # nothing was sent: the client went away
        if key not in self._children:
            self._children[key] = self._metrics.requests.labels(*key), self._metrics.request_seconds.labels(path)
        requests, histogram = self._children[key]
        requests.inc()
        histogram.observe(seconds)
        if ERROR in scope:
            self._metrics.errors.labels(scope[ERROR]).inc()
