"""Bytes on a connection that are not, or not yet, a request."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from server_tools import ASK, HeldEngine, Running, read_all, serving, until

import pgfast

BODY = json.dumps(ASK).encode()
POST = b"POST /v1/answer HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(scope="module")
def server(demo: pgfast.Engine) -> Iterator[Running]:
    with serving(demo, max_head=4096, head_timeout=0.5, keep_alive=1.0) as running:
        yield running


def exchange(server: Running, *pieces: bytes) -> bytes:
    """Send, and read until the server closes."""
    with server.connect() as sock:
        for piece in pieces:
            sock.sendall(piece)
        return read_all(sock)


def status_and_code(raw: bytes) -> tuple[int, str]:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "pieces",
    [
        [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)],  # a TLS hello
        [b"nonsense\r\n\r\n"],
        [bytes(range(256))],
        [b"GET / HTTP/9.9\r\n\r\n"],
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
        [b"GET / HTTP/1.1\r\nHost : a\r\n\r\n"],
        [b"GET / HTTP/1.1\r\n\xff\xfe: a\r\n\r\n"],
        [b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n"],
        [b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n"],
        [b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"],
        [b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n"],
        [b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"],
        [b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"],
    ],
)
def test_what_is_not_http(server: Running, pieces: list[bytes]) -> None:
    assert status_and_code(exchange(server, *pieces)) == (400, "invalid_http")


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET / HTTP/1.1\r\nA: " + b"a" * 2**20 + b"\r\n\r\n"],
        [b"GET / HTTP/1.1\r\nA: ", *[b"a" * 1000] * 5],
        [b"GET / HTTP/1.1\r\n", *[b"A: b\r\n"] * 1000],
        [b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n"],
        [b"GET /", *[b"a" * 1000] * 5],
        [b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1000 + b"\r\n"],
    ],
)
def test_a_head_that_is_too_large(server: Running, pieces: list[bytes]) -> None:
    with server.connect() as sock:
        try:
            for piece in pieces:
                sock.sendall(piece)
        except (ConnectionResetError, BrokenPipeError):  # it was refused while it was sent
            return
        raw = read_all(sock)
    if raw:  # a reset may overtake it
        assert status_and_code(raw) == (431, "head_too_large")


def test_a_head_that_is_too_large_is_told_so(server: Running) -> None:
    assert status_and_code(exchange(server, b"GET / HTTP/1.1\r\nA: " + b"a" * 5000)) == (431, "head_too_large")


@pytest.mark.parametrize("end", [b"0\r\n" + b"A: b\r\n" * 1000, b"0\r\nA: " + b"a" * 5000, b"5;" + b"a" * 5000])
def test_trailers_and_extensions_of_chunks_count_as_head(server: Running, end: bytes) -> None:
    head = b"POST /v1/answer HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connect() as sock:
        sock.sendall(head + b"1\r\n{\r\n")
        until(lambda: server.service.admission.taken == 1)
        sock.sendall(end)
        assert read_all(sock) == b""  # a response was due: there is nothing to be said in its place
    until(lambda: server.service.admission.taken == 0)


def test_a_body_in_small_chunks_is_no_head(server: Running) -> None:
    head = b"POST /v1/answer HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"2;a=b\r\n" + BODY[i : i + 2].ljust(2) + b"\r\n" for i in range(0, len(BODY), 2))
    with server.connect() as sock:
        sock.sendall(head + chunks + b"0\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_head_that_comes_too_slowly(server: Running) -> None:
    start = time.monotonic()
    with server.connect() as sock:
        sock.settimeout(0.1)
        raw = b""
        for byte in GET * 100:
            sock.sendall(bytes([byte]))  # each byte in time, all of them never
            try:
                raw = sock.recv(65536)
                break
            except TimeoutError:
                pass
    assert status_and_code(raw) == (408, "head_timeout")
    assert time.monotonic() - start < 2.4  # of 10


def test_a_connection_without_a_word_is_closed(server: Running) -> None:
    assert exchange(server) == b""
    assert exchange(server, b"\r\n\r\n") == b""


def test_an_idle_connection_is_closed(server: Running) -> None:
    raw = exchange(server, GET)
    assert raw.startswith(b"HTTP/1.1 200")
    assert raw.endswith(b"ok\n")


def test_a_refused_body_that_never_comes_does_not_keep_the_connection(server: Running) -> None:
    raw = exchange(server, b"POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n", b"x")
    assert raw.startswith(b"HTTP/1.1 404")


def test_requests_one_behind_the_other(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall((POST + GET) * 5)
        raw = b""
        while raw.count(b"ok\n") < 5:
            raw += sock.recv(65536)
    assert raw.count(b"HTTP/1.1 200 OK") == 10
    assert raw.count(b'"text":"blue"') == 5
    assert raw.index(b'"text":"blue"') < raw.index(b"ok\n")  # in their order


def test_who_leaves_with_requests_in_line_leaves_nothing_behind(demo: pgfast.Engine, caplog: pytest.LogCaptureFixture) -> None:
    held = HeldEngine(demo)
    with serving(held) as server:
        with server.connect() as sock:
            sock.sendall(POST * 3)
            until(lambda: held.held)
        until(lambda: not server.service.admission.taken and held.cancelled == 1)
    assert not caplog.records


def test_who_does_not_read_is_cut_off(demo: pgfast.Engine) -> None:
    held = HeldEngine(demo)
    with serving(held, timeout=0.5) as server, server.connect() as sock:
        sock.sendall(POST.replace(b"/v1/answer", b"/v1/answer?stream=1"))
        until(lambda: held.held)
        held.held[0].text = lambda: "x" * 30_000_000  # more than all buffers between
        held.held[0].on_progress()
        until(lambda: not server.service.admission.taken)
        assert held.cancelled == 1
        until(lambda: not server.server.server_state.connections)  # closing alone would wait for the client


def test_garbage_behind_a_request_ends_the_connection(server: Running) -> None:
    raw = exchange(server, GET)
    assert raw.startswith(b"HTTP/1.1 200")
    with server.connect() as sock:
        sock.sendall(GET)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        sock.sendall(b"\x00\x01\x02 garbage\r\n\r\n")
        assert status_and_code(read_all(sock)) == (400, "invalid_http")


def test_too_many_connections(demo: pgfast.Engine) -> None:
    with serving(demo, max_connections=3) as server:
        socks = [server.connect() for _ in range(3)]
        until(lambda: len(server.server.server_state.connections) == 3)
        assert status_and_code(exchange(server)) == (503, "too_many_connections")
        for sock in socks:
            sock.sendall(GET)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
            sock.close()
        until(lambda: not server.server.server_state.connections)
        assert server.request("GET", "/healthz").status == 200


def test_offers_of_other_protocols_are_passed_over(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    for name in (b"websocket", b"h2c"):
        with server.connect() as sock:
            sock.sendall(GET[:-2] + b"Connection: Upgrade\r\nUpgrade: " + name + b"\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
    assert not caplog.records


def test_old_http(server: Running) -> None:
    raw = exchange(server, POST.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert raw.startswith(b"HTTP/1.1 200")
    assert b'"text":"blue"' in raw


def test_a_log_line_at_most_for_each(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    exchange(server, b"nonsense\r\n\r\n")
    exchange(server, b"GET / HTTP/1.1\r\nA: " + b"a" * 5000)
    assert len(caplog.records) <= 2
    assert all(record.levelname == "WARNING" and record.exc_info is None for record in caplog.records)
