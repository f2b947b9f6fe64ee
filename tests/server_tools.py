"""A server in this process for the tests of pgfast.server, and engines that wait until they are told."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pgfast
from pgfast.loading import demo_bundle
from pgfast.server.config import ServerConfig
from pgfast.server.serving import Server, bind, url_of

PICTURE = (demo_bundle().parent / "blue_circle.png").read_bytes()
QUESTION = "what color is the shape?"
ASK = {"image": base64.b64encode(PICTURE).decode(), "question": QUESTION}
BODY = json.dumps(ASK).encode()
HEAD = b"POST /v1/answer HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
WAIT = 20.0
"""Seconds after which something that should happen at once is taken for not happening."""


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])


class Running:
    """A server that listens."""

    def __init__(self, server: Server, url: str) -> None:
        self.server, self.service, self.url = server, server.service, url
        self.address = (urlsplit(url).hostname or "", urlsplit(url).port or 0)

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """One request on a connection of its own; a dict goes as JSON."""
        connection = http.client.HTTPConnection(*self.address, timeout=WAIT)
        try:
            if isinstance(body, dict):
                body, headers = json.dumps(body), {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def ask(self, **changes: Any) -> Reply:
        """POST /v1/answer; None takes a field away."""
        fields = {name: value for name, value in {**ASK, **changes}.items() if value is not None}
        return self.request("POST", "/v1/answer", fields)

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value; 0, if nothing was counted yet."""
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0

    def connect(self) -> socket.socket:
        """A raw connection."""
        return socket.create_connection(self.address, timeout=WAIT)


@contextlib.contextmanager
def serving(engine: Any, **settings: Any) -> Iterator[Running]:
    """Run a server in a thread; at the end it drains."""
    ready = threading.Event()
    server = Server(engine, ServerConfig(**settings), ready.set)
    sock = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([sock],), name="server")
    thread.start()
    try:
        assert ready.wait(WAIT)
        yield Running(server, url_of(sock))
    finally:
        server.drain()
        thread.join(WAIT)
        assert not thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the connection's end, however it ends."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            found += piece
    return found


class HeldEngine:
    """The demo engine, but answers come only when `release` is called; `cancelled` counts those given up."""

    def __init__(self, engine: pgfast.Engine) -> None:
        self._engine = engine
        self.held: list[_Held] = []
        self.cancelled = 0
        self.on_step = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, *args: Any, on_progress: Callable[[], None], **options: Any) -> _Held:
        pending = self._engine.submit(*args, **options)
        pending.result(WAIT)
        self.held.append(_Held(self, pending, on_progress))
        return self.held[-1]

    def release(self) -> None:
        """Let all that are held be done."""
        for held in self.held:
            held.done = True
            held.on_progress()
        self.held.clear()


class _Held:
    def __init__(self, engine: HeldEngine, pending: Any, on_progress: Callable[[], None]) -> None:
        self._engine, self._pending, self.on_progress = engine, pending, on_progress
        self.done = False

    def result(self, timeout: float) -> Any:
        assert self.done
        return self._pending.result(timeout)

    def text(self) -> str:
        return "bl" if not self.done else str(self._pending.text())

    def cancel(self) -> None:
        if not self.done:
            self._engine.cancelled += 1
            self._engine.held.remove(self)


class Decoding:
    """The demo engine; counts how many pictures are decoded at a time, and waits for as many as are wanted."""

    def __init__(self, engine: pgfast.Engine) -> None:
        self._engine, self.on_step = engine, None
        self.most = self.now = 0
        self.lock, self.go = threading.Lock(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def prepare_image(self, picture: bytes, **options: Any) -> Any:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        assert self.go.wait(WAIT)
        with self.lock:
            self.now -= 1
        return self._engine.prepare_image(picture, **options)


def send(server: Running, body: bytes = BODY) -> Any:
    sock = server.connect()
    sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return sock


def answer(raw: bytes) -> tuple[int, dict[bytes, bytes], Any]:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in lines)
    return int(first.split()[1]), headers, json.loads(body[: int(headers[b"content-length"])])
