"""Servers for the page's tests: any ASGI app on a free port, and one whose answers the test gives itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from pgfast.engine import Engine
from pgfast.server import page
from pgfast.server.app import build_app
from pgfast.server.config import ServerConfig
from pgfast.server.protocol import LimitedProtocol


@contextlib.contextmanager
def serving(app: ASGIApp, config: ServerConfig) -> Iterator[str]:
    """Serve an app on a free port of this machine, as `pgfast serve` does; gives its address, with a slash at the end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # from here on nobody is refused
        protocol: Any = partial(LimitedProtocol, config)
        settings = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def serving_real(engine: Engine, config: ServerConfig) -> Iterator[str]:
    """The whole server around an engine."""
    app = build_app(engine, config)
    with serving(app, config) as address:
        yield address
    app.state.service.close()


class Asked:
    """A request of the page that waits for the test's words.

    Attributes:
        picture: The file that came.
        fields: The form's other fields.
        key: The Authorization header.
        gone: Set when the page broke the stream off.
    """

    def __init__(self, picture: bytes, fields: list[tuple[str, str]], key: str | None) -> None:
        self.picture, self.fields, self.key = picture, fields, key
        self.gone = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._words = asyncio.Queue[Any]()

    def _give(self, word: Any) -> None:
        self._loop.call_soon_threadsafe(self._words.put_nowait, word)

    def piece(self, text: str) -> None:
        self._give(("piece", {"text": text}))

    def answer(self, text: str, confidence: float = 0.5, **more: Any) -> None:
        """The last event, and the end."""
        same = {"id": "answer-1", "model": "fake", "choices": None, "finish_reason": "stop", "timings": {"total": 0.01}}
        self._give(("answer", {"text": text, "confidence": confidence, "token_logprobs": [-0.1], **same, **more}))
        self._give(None)

    def error(self, message: str) -> None:
        self._give(("error", {"error": {"message": message, "code": "internal_error"}}))
        self._give(None)

    def end(self) -> None:
        """The end, whatever came before."""
        self._give(None)

    def refuse(self, status: int, message: str = "no", **headers: str) -> None:
        self._give(JSONResponse({"error": {"message": message}}, status, {k.replace("_", "-"): v for k, v in headers.items()}))

    async def response(self) -> Response:
        first = await self._words.get()
        return first if isinstance(first, Response) else StreamingResponse(self._events(first), media_type="text/event-stream")

    async def _events(self, word: Any) -> AsyncGenerator[bytes]:
        try:
            while word is not None:
                yield f"event: {word[0]}\ndata: {json.dumps(word[1])}\n\n".encode()
                word = await self._words.get()
        except (asyncio.CancelledError, GeneratorExit):
            self.gone.set()
            raise


class Fake:
    """The real page over answers that the test gives.

    Args:
        config: Limits that the page is told.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._asked = queue.Queue[Asked]()
        self.app = Starlette(
            routes=[*page.routes(SimpleNamespace(model="fake"), config), Route("/v1/answer", self._answer, methods=["POST"])]
        )

    def asked(self) -> Asked:
        """The next request, waited for."""
        return self._asked.get(timeout=20)

    @property
    def idle(self) -> bool:
        """Whether no request waits to be looked at."""
        return self._asked.empty()

    async def _answer(self, request: Request) -> Response:
        async with request.form() as form:
            picture = await form["image"].read()  # type: ignore[union-attr]
            fields = [(name, str(value)) for name, value in form.multi_items() if name != "image"]
        asked = Asked(picture, fields, request.headers.get("authorization"))
        self._asked.put(asked)
        return await asked.response()
