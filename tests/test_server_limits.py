"""What the server refuses, gives up and cancels: places, bytes, pixels, seconds."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image
from server_tools import (
    ASK,
    HEAD,
    PICTURE,
    QUESTION,
    WAIT,
    Decoding,
    HeldEngine,
    Running,
    answer,
    read_all,
    send,
    serving,
    until,
)

import pgfast


@pytest.fixture
def held(demo: pgfast.Engine) -> Iterator[HeldEngine]:
    engine = HeldEngine(demo)
    yield engine
    engine.release()


def slots(engine: Any) -> int:
    return int(engine.load_figures().slots)


def test_a_full_house_refuses_before_the_body(held: HeldEngine) -> None:
    with serving(held, max_queue=2) as server, ThreadPoolExecutor(32) as pool:
        places = slots(held) + 2
        asked = [pool.submit(server.ask) for _ in range(places)]
        until(lambda: len(held.held) == places)
        sock = server.connect()
        sock.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")  # and no body
        status, headers, error = answer(sock.recv(65536))
        assert (status, error["error"]["code"]) == (429, "overloaded")
        assert 1 <= int(headers[b"retry-after"]) <= 60
        sock.sendall(b"x" * 1000 + b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")  # the connection is good for more
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        sock.close()
        assert server.request("GET", "/readyz").status == 200
        assert server.metric("pgfast_rejected_total", reason="overloaded") == 1
        assert server.metric("pgfast_requests_in_house") == places
        held.release()
        assert [reply.result().status for reply in asked] == [200] * places
        until(lambda: server.metric("pgfast_requests_in_house") == 0)
        with ThreadPoolExecutor(1) as one:
            last = one.submit(server.ask)
            until(lambda: held.held)
            held.release()
            assert last.result().status == 200


def test_retry_after_follows_the_measured_rate(demo: pgfast.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from pgfast.server.admission import Admission
    from pgfast.server.config import ServerConfig
    from pgfast.server.metrics import Metrics

    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    admission = Admission(ServerConfig(max_queue=84), 16, Metrics(demo))
    assert admission.retry_after() == 1
    for _ in range(200):  # ten requests a second
        now += 0.1
        admission.enter(0)
        admission.leave(0)
    for _ in range(100):
        admission.enter(0)
    assert admission.retry_after() in (10, 11)
    now += 1000  # a standstill counts
    assert admission.retry_after() == 60


def test_bytes_of_all_bodies_are_limited(held: HeldEngine) -> None:
    with serving(held, max_body=2**20, max_bodies=2**20 + 2**19) as server:
        first = send(server)
        until(lambda: held.held)
        second = server.connect()
        second.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")  # counts as the longest one
        until(lambda: server.service.admission.taken == 2)
        third = server.connect()
        third.sendall(HEAD + b"Content-Length: 900000\r\n\r\n")
        assert answer(third.recv(65536))[0] == 429
        for sock in (first, second, third):
            sock.close()
        until(lambda: not server.service.admission.taken)
    assert held.cancelled == 1


@pytest.mark.parametrize("length", ["0" * 20 + "900000", "900000 ", "\t900000\t"])
def test_a_length_in_an_odd_notation_counts(demo: pgfast.Engine, length: str) -> None:
    with serving(demo, max_body=2**20, max_bodies=2**20 + 2**19) as server:
        socks = [server.connect(), server.connect()]
        for taken, sock in enumerate(socks):
            until(lambda taken=taken: server.service.admission.taken == taken)
            sock.sendall(HEAD + f"Content-Length: {length}\r\n\r\n".encode())
        assert answer(socks[1].recv(65536))[0] == 429
        for sock in socks:
            sock.close()
        until(lambda: not server.service.admission.taken)


def test_a_long_body_is_refused_by_what_it_says(demo: pgfast.Engine) -> None:
    with serving(demo, max_body=10_000, max_bodies=10_000_000) as server:
        sock = server.connect()
        sock.sendall(HEAD + b"Content-Length: 10001\r\n\r\n")
        status, _, error = answer(sock.recv(65536))
        assert (status, error["error"]["code"]) == (413, "body_too_large")
        sock.close()
        sock = server.connect()  # waits to be asked: it is told to go, and its connection is closed
        sock.sendall(HEAD + b"Content-Length: 10001\r\nExpect: 100-continue\r\n\r\n")
        assert answer(read_all(sock))[0] == 413
        sock.close()
        assert server.request("POST", "/v1/answer", b"{" + b" " * 9_999, {"Content-Type": "application/json"}).status == 400


def test_a_long_body_in_chunks_is_not_read_to_its_end(demo: pgfast.Engine) -> None:
    with serving(demo, max_body=100_000, max_bodies=10_000_000) as server:
        sock = server.connect()
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n" % 50_000 + b" " * 50_000 + b"\r\n"
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # when the server has enough
            sock.sendall(10_000 * chunk)
        sock.close()
        sock = server.connect()
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + 3 * chunk)
        status, headers, error = answer(read_all(sock))
        assert (status, headers[b"connection"], error["error"]["code"]) == (413, b"close", "body_too_large")
        sock.close()
        until(lambda: not server.service.admission.taken)


def test_a_large_picture_is_refused_before_it_is_decoded(demo: pgfast.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("1", (8000, 6000)).save(file, "PNG")  # 48 million pixels in 6 kB
    loaded: list[Any] = []
    load = Image.Image.load
    with serving(demo, max_pixels=1_000_000) as server:
        monkeypatch.setattr(Image.Image, "load", lambda self: loaded.append(self) or load(self))
        reply = server.ask(image=base64.b64encode(file.getvalue()).decode())
        assert (reply.status, reply.code) == (400, "image_error")
        assert "8000 x 6000 pixels: at most 1,000,000" in reply.json["error"]["message"]
        assert not loaded
        assert server.ask().status == 200


def test_decodes_at_a_time_are_limited_and_a_picture_is_decoded_once(demo: pgfast.Engine) -> None:
    engine = Decoding(demo)
    with serving(engine, decoders=2) as server, ThreadPoolExecutor(12) as pool:
        pictures = [base64.b64encode(PICTURE + bytes([i])).decode() for i in range(4)]
        asked = [pool.submit(server.ask, image=picture) for picture in pictures * 3]
        until(lambda: server.service.admission.taken == 12 and engine.now == 2)
        until(lambda: server.metric("pgfast_picture_cache_hits_total") == 8)
        engine.go.set()
        assert [reply.result().status for reply in asked] == [200] * 12
        assert engine.most == 2
        assert server.metric("pgfast_picture_cache_misses_total") == 4


def test_too_slow_an_answer(held: HeldEngine) -> None:
    with serving(held, timeout=0.2) as server:
        reply = server.ask()
        assert (reply.status, reply.code) == (504, "timeout")
        assert held.cancelled == 1
        reply = server.request("POST", "/v1/answer?stream=1", ASK)
        assert (reply.status, reply.code) == (504, "timeout")
        assert held.cancelled == 2


def test_too_slow_a_stream_ends_with_an_error(held: HeldEngine) -> None:
    with serving(held, timeout=0.5) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.request, "POST", "/v1/answer?stream=1", ASK)
        until(lambda: held.held)
        held.held[0].on_progress()
        reply = asked.result()
        assert reply.status == 200
        piece, error, _ = reply.body.decode().split("\n\n")
        assert piece == 'event: piece\ndata: {"text":"bl"}'
        name, data = error.split("\n")
        assert (name, json.loads(data.removeprefix("data: "))["error"]["code"]) == ("event: error", "timeout")
        assert held.cancelled == 1
        assert server.metric("pgfast_errors_total", kind="timeout") == 1


def test_too_slow_an_upload(demo: pgfast.Engine) -> None:
    with serving(demo, timeout=0.2) as server:
        sock = server.connect()
        sock.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        status, headers, error = answer(read_all(sock))
        assert (status, headers[b"connection"], error["error"]["code"]) == (504, b"close", "timeout")
        sock.close()


def test_an_upload_that_is_cut_off(demo: pgfast.Engine, caplog: pytest.LogCaptureFixture) -> None:
    with serving(demo) as server:
        sock = server.connect()
        sock.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        until(lambda: server.service.admission.taken == 1)
        sock.close()
        until(lambda: server.service.admission.taken == 0)
    assert not caplog.records


def test_draining_lets_requests_finish_and_refuses_new_ones(held: HeldEngine) -> None:
    with serving(held) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask)
        until(lambda: held.held)
        server.server.drain()
        reply = server.ask()
        assert (reply.status, reply.code, reply.headers["retry-after"]) == (503, "draining", "5")
        assert server.request("GET", "/readyz").status == 503
        assert server.request("GET", "/healthz").status == 200
        held.release()
        assert asked.result().json["text"] == "blue"


def test_draining_ends_in_time(held: HeldEngine, caplog: pytest.LogCaptureFixture) -> None:
    with serving(held, drain_timeout=0.1) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask)
        until(lambda: held.held)
        server.server.drain()
        reply = asked.result()
        assert (reply.status, reply.code) == (503, "draining")
    assert held.cancelled == 1
    assert [record.getMessage() for record in caplog.records] == ["1 requests were still running: they are cut off"]


def test_nothing_is_answered_before_the_engine_is_warm(demo: pgfast.Engine) -> None:
    class Cold(HeldEngine):
        go = threading.Event()

        def answer(self, *args: Any, **options: Any) -> Any:
            assert self.go.wait(WAIT)
            return self._engine.answer(*args, **options)

        def submit(self, *args: Any, **options: Any) -> Any:
            return self._engine.submit(*args, **options)

    from pgfast.server.config import ServerConfig
    from pgfast.server.serving import Server, bind, url_of

    engine, ready = Cold(demo), threading.Event()
    server, sock = Server(engine, ServerConfig(), ready.set), bind("127.0.0.1", 0)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    until(lambda: server.started)
    running = Running(server, url_of(sock))
    assert running.request("GET", "/healthz").status == 200
    assert running.request("GET", "/readyz").status == 503
    reply = running.ask()
    assert (reply.status, reply.code) == (503, "not_ready")
    engine.go.set()
    assert ready.wait(WAIT)
    assert running.request("GET", "/readyz").status == 200
    assert running.ask().json["text"] == "blue"
    server.drain()
    thread.join(WAIT)


def test_a_fault_of_the_engine_is_a_500_without_details(demo: pgfast.Engine, caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(HeldEngine):
        error: Exception = pgfast.PgfastError("the graph fails")

        def submit(self, *args: Any, **options: Any) -> Any:
            raise self.error

    engine = Faulty(demo)
    with serving(engine) as server:
        reply = server.ask()
        assert (reply.status, reply.code, reply.json["error"]["type"]) == (500, "internal_error", "server_error")
        assert b"graph" not in reply.body
        engine.error = ZeroDivisionError("a bug")
        reply = server.ask()
        assert (reply.status, reply.code, reply.headers["x-content-type-options"]) == (500, "internal_error", "nosniff")
        assert server.metric("pgfast_errors_total", kind="internal_error") == 2
        assert not server.service.admission.taken
    first, second = caplog.records
    assert first.getMessage() == "a request failed: the graph fails"
    assert first.exc_info is None  # one line
    assert second.exc_info is not None  # whoever looks for a bug needs all


def test_a_question_that_the_scheduler_refuses(demo: pgfast.Engine) -> None:
    from pgfast.errors import OverloadedError

    class Busy(HeldEngine):
        def submit(self, *args: Any, **options: Any) -> Any:
            raise OverloadedError("16 requests are waiting already: try again later")

    with serving(Busy(demo)) as server:
        reply = server.ask(question=QUESTION)
        assert (reply.status, reply.code, reply.headers["retry-after"]) == (429, "overloaded", "1")
