"""A server in a thread of the test, on a free port, as `pgfast serve` would run it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn

from pgfast import Engine
from pgfast.server.app import build_app
from pgfast.server.config import ServerConfig
from pgfast.server.protocol import LimitedProtocol
from pgfast.server.service import AnswerService


@contextlib.contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[tuple[str, AnswerService]]:
    """Serve from a thread; its address, and what is behind it."""
    config = ServerConfig(**settings)
    app = build_app(engine, config)
    protocol: Any = partial(LimitedProtocol, config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(
            uvicorn.Config(app, http=protocol, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.service
        finally:
            server.should_exit = True
            thread.join()
            app.state.service.close()
