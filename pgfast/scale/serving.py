"""`pgfast serve --ray`: the server's application in replicas of Ray Serve, one engine each."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pgfast.errors import ClusterError, InputError
from pgfast.server.app import build_app
from pgfast.server.config import ServerConfig

from .cluster import Cluster, Placement, connected, one_line

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAME = "pgfast"
"""Of the application on the cluster."""
SLOTS = 32
"""Most questions that an engine decodes at a time."""
AT_THE_DOOR = 64
"""Requests that a replica takes beyond those it answers: it tells them 429 itself, and health checks come through."""
FAILURES = 5
"""Answers that fail in a row before a replica is replaced."""


class Replica:
    """One engine behind the server's application.

    Args:
        bundle: Folder on this node; None: the demo model.
        provider: As in `pgfast.load`.
        threads: CPU threads of the engine.
        config: Limits, for each replica.
    """

    def __init__(self, bundle: str | None, provider: str, threads: int, config: ServerConfig) -> None:
        import pgfast

        app = build_app(pgfast.load(bundle, provider=provider, threads=threads, spin=False), config)
        app.state.service.warm()
        self._watched = FailureCount(app)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application, to `serve.ingress`."""
        return self._watched

    def check_health(self) -> None:
        """Raise when the engine fails every answer, as it does after its GPU is lost; Ray Serve replaces the replica."""
        if self._watched.in_a_row >= FAILURES:
            raise RuntimeError(f"the last {self._watched.in_a_row} answers failed")


class FailureCount:
    """Counts responses 500 since the last answer.

    Args:
        app: The application that is watched.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.in_a_row = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] == 500:
                    self.in_a_row += 1
                elif message["status"] == 200 and scope["method"] == "POST":
                    self.in_a_row = 0
            await send(message)

        await self._app(scope, receive, watch)


def build_application(cluster: Cluster, placement: Placement, config: ServerConfig) -> Application:
    """Describe the deployment; `ray.serve.run` starts it.

    Args:
        cluster: The bundle, and how it is loaded.
        placement: How many replicas, of what size.
        config: Limits, for each replica.
    """
    from ray import serve

    deployment: Any = serve.deployment(
        name=NAME,
        num_replicas=placement.engines,
        ray_actor_options={"num_cpus": placement.num_cpus, "num_gpus": placement.num_gpus},
        # the replica's own queue says no first, with Retry-After
        max_ongoing_requests=config.max_queue + SLOTS + AT_THE_DOOR,
        max_queued_requests=AT_THE_DOOR,
        max_constructor_retry_count=2,
        graceful_shutdown_timeout_s=config.drain_timeout,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"enable_access_log": False},
    )(serve.ingress()(Replica))
    threads = cluster.threads or placement.num_cpus
    application: Application = deployment.bind(cluster.bundle, cluster.provider, threads, config)
    return application


def start(application: Application, host: str, port: int, config: ServerConfig) -> None:
    """Start Ray Serve with its proxies, and the application; returns when it answers.

    Where Serve runs on the cluster already, it keeps its host and port.

    Raises:
        ClusterError: The port cannot be had, or no replica starts.
    """
    from ray import serve

    http: dict[str, Any] = {"host": host, "port": port, "keep_alive_timeout_s": math.ceil(config.keep_alive)}
    try:
        # the application answers 504 itself; this is for a replica that hangs
        serve.start(http_options={**http, "request_timeout_s": config.timeout + 10})
        serve.run(application, name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise ClusterError(f"Ray Serve did not start: {one_line(error)}") from error


def run(cluster: Cluster, config: ServerConfig, host: str, port: int, on_ready: Callable[[int], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then let requests in flight finish and take the application from the cluster.

    Args:
        cluster: Where, and with what engines.
        config: Limits, for each replica.
        host: Interface of every node that has a replica.
        port: Its port.
        on_ready: Called with the number of replicas when they answer.

    Raises:
        PgfastError: It cannot be started.
    """
    if port == 0:
        raise InputError("Ray Serve needs a port of its own: give one with --port")
    with connected(cluster) as placement:
        from ray import serve

        start(build_application(cluster, placement, config), host, port, config)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        on_ready(placement.engines)
        stop.wait()
        serve.delete(NAME)
        if not serve.status().applications:  # nobody else's
            serve.shutdown()  # type: ignore[no-untyped-call]
