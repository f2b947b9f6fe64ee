"""uvicorn around the application: the port, the start, the graceful end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from pgfast.errors import InputError

from .app import build_app
from .config import ServerConfig
from .protocol import LimitedProtocol
from .service import AnswerService

if TYPE_CHECKING:
    from pgfast.engine import Engine

logger = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """Take a port, so that a port in use is noticed before a large model is loaded.

    Args:
        host: Name or address of an interface.
        port: 0: any free one.

    Raises:
        InputError: It cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except BaseException:
            sock.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"cannot listen on {host}, port {port}: {reason}") from error
    return sock


def url_of(sock: socket.socket) -> str:
    """The address to open in a browser."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Listens from the start, says "not ready" while the engine warms up, and stays reachable while it drains.

    `run([bind(host, port)])` returns after SIGTERM or SIGINT, or `drain`; a second signal cuts off what is still in flight.

    Args:
        engine: Answers; stays the caller's to close.
        config: Limits.
        on_ready: Called when the first request would be answered quickly.
    """

    def __init__(self, engine: Engine, config: ServerConfig, on_ready: Callable[[], None]) -> None:
        app = build_app(engine, config)
        settings = uvicorn.Config(
            app,
            http=partial(LimitedProtocol, config),  # type: ignore[arg-type]  # uvicorn calls it, no more
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=config.keep_alive,  # type: ignore[arg-type]  # seconds for call_later
            timeout_graceful_shutdown=1,
        )
        super().__init__(settings)
        self.service: AnswerService = app.state.service
        self._on_ready = on_ready
        self._drain_until = 0.0
        self._failure: BaseException | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve.

        Raises:
            PgfastError: The engine cannot answer even a first question.
        """
        self.service.admission.ready = False
        try:
            super().run(sockets)
        finally:
            self.service.close()
        if self._failure is not None:
            raise self._failure

    def drain(self) -> None:
        """Refuse new requests, let those in flight finish, then end; from any thread."""
        self.service.admission.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and warm up meanwhile."""
        await super().startup(sockets)
        self._warming = asyncio.get_running_loop().run_in_executor(None, self.service.warm)
        self._warming.add_done_callback(self._warmed)

    def _warmed(self, warming: asyncio.Future[None]) -> None:
        self._failure = None if warming.cancelled() else warming.exception()
        if self._failure is not None:
            self.should_exit = True
        elif not self.service.admission.draining:
            self.service.admission.ready = True
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: uvicorn would close the port at once, and end with the signal instead of with 0."""
        if self.service.admission.draining:
            self.should_exit = True
        self.drain()

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether it is time to end."""
        admission, now = self.service.admission, asyncio.get_running_loop().time()
        if admission.draining:
            self._drain_until = self._drain_until or now + self.service.config.drain_timeout
            if not admission.taken or now >= self._drain_until:
                self.should_exit = True
        if self.should_exit and admission.taken:
            logger.warning("%d requests were still running: they are cut off", admission.taken)
            for task in self.server_state.tasks:
                task.cancel()
        return await super().on_tick(counter)
