"""What may happen on a connection before there is a request, and after its response: bounds that uvicorn does not have."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from .admission import TASKS
from .config import ServerConfig
from .http_errors import ApiError

logger = logging.getLogger(__name__)


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a limit on a head's bytes and seconds and on connections.

    A connection that goes away cancels the tasks in its requests' `scope[TASKS]`.

    Args:
        limits: The server's settings.
        options: As uvicorn gives them.
    """

    def __init__(self, limits: ServerConfig, **options: Any) -> None:
        super().__init__(**options)
        self._limits = limits
        self._part: Literal["head", "body"] | None = None  # what of a request comes next
        self._begun = 0  # requests
        self._head = 0  # bytes of the request's head, and of trailers, as far as the parser has told
        self._untold = 0  # bytes of an unfinished head, or since the parser last said anything: it keeps them
        self._heard = False
        self._deadline: asyncio.TimerHandle | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._cycles: list[RequestResponseCycle] = []  # pipelined requests may be several
        self._working: set[asyncio.Task[Any]] = set()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for a head."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(ApiError(503, "too_many_connections", "too many connections are open: try again later", retry_after=1))
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel what was done for the client."""
        super().connection_lost(exc)
        self._stop_waiting()
        self.resume_writing()
        for cycle in self._cycles:  # uvicorn tells only the last one
            cycle.disconnected = True
        tasks = list(self._working)
        self._working.clear()  # how they know why
        for task in tasks:
            task.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse."""
        self._heard, part, begun = False, self._part, self._begun
        super().data_received(data)
        if self._part == "head" and (self._begun == begun or (part is None and self._begun == begun + 1)):
            self._untold += len(data)  # all of it belongs to this head
        elif self._heard:
            self._untold = 0
        else:
            self._untold += len(data)
        if self._is_too_large():
            self._refuse_head()
        elif self._deadline is None and self._is_idle():
            self._wait()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._heard, self._part, self._head, self._untold = True, "head", 0, 0
        self._begun += 1
        self.scope[TASKS] = self._working  # type: ignore[literal-required]

    def on_url(self, url: bytes) -> None:
        """A part of it."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """From here on the application is in charge."""
        self._heard, self._part = True, "body"
        self._stop_waiting()
        super().on_headers_complete()
        self._cycles = [*(cycle for cycle in self._cycles if not cycle.response_complete), self.cycle]

    def on_body(self, body: bytes) -> None:
        """A part of it."""
        self._heard = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next one may begin."""
        self._heard, self._part = True, None
        super().on_message_complete()
        if not self.pipeline:  # uvicorn stops reading while much is unread, and would not notice then that the client goes
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        """The client does not read; closing would wait for it."""
        super().pause_writing()
        self._patience = self._patience or self.loop.call_later(self._limits.timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """It does."""
        super().resume_writing()
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def send_400_response(self, msg: str) -> None:
        """The parser has given up."""
        if self._is_too_large():
            self._refuse_head()
        else:
            self._refuse(ApiError(400, "invalid_http", "this is not HTTP/1.1"))

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: that a client offers HTTP/2 or WebSocket is no news."""

    def _count(self, size: int) -> None:
        self._heard = True
        self._head += size
        if self._is_too_large():
            raise httptools.HttpParserError("the head is too large")  # stops the parser

    def _is_too_large(self) -> bool:
        return max(self._head, self._untold) > self._limits.max_head

    def _refuse_head(self) -> None:
        self._refuse(ApiError(431, "head_too_large", f"the head is larger than {self._limits.max_head:,} bytes"))

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(self._limits.head_timeout, self._too_late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self._part != "head":  # nobody is there to be told
            self.transport.close()
            return
        seconds = self._limits.head_timeout
        self._refuse(ApiError(408, "head_timeout", f"the head of a request did not arrive within {seconds:g} seconds"))

    def _refuse(self, error: ApiError) -> None:
        """Answer, where no other answer is on its way, and close."""
        if self.transport.is_closing():
            return
        if self._is_idle():
            body = error.body()
            lines = [b"%b: %b\r\n" % header for header in [*error.headers(body), (b"connection", b"close")]]
            self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        self.transport.close()
