"""Pictures by URL: what a host may send, how long it may take, and TLS."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TESTS
from picture_host import CHUNKED, HOST, PICTURE, Server, endless, make, moved, say, status, whole

from pgfast.errors import ImageError
from pgfast.server import remote_pictures
from pgfast.server.remote_pictures import RemotePictures

TLS = TESTS / "tls"
"""An authority of our own and a certificate of pictures.example, both good for a hundred years."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.mark.parametrize("line", ["201 Created", "204 No Content", "206 Partial", "304 Not Modified", "404 No", "500 Oh"])
def test_only_200_is_an_answer(server: Server, line: str) -> None:
    server.replies["/0"] = status(line, "Content-Length: 0")
    with pytest.raises(ImageError, match=f"status {line[:3]}"):
        make(f"{HOST}:{server.port}").fetch(f"http://{HOST}:{server.port}/0")


def test_a_compressed_body_is_refused(server: Server) -> None:
    server.replies["/0"] = whole(b"x", "Content-Encoding: gzip")
    with pytest.raises(ImageError, match="compressed"):
        make(f"{HOST}:{server.port}").fetch(f"http://{HOST}:{server.port}/0")


def test_bodies_up_to_the_limit_in_any_framing(server: Server) -> None:
    body = b"x" * 1000
    server.replies |= {
        "/length": whole(body),
        "/close": status("200 OK", body=body),
        "/chunked": say(CHUNKED, b"1f4\r\n" + body[:500] + b"\r\n", b"1f4;a=b\r\n" + body[500:] + b"\r\n", b"0\r\n\r\n"),
    }
    for path in ("/length", "/close", "/chunked"):
        url = f"http://{HOST}:{server.port}{path}"
        assert make(f"{HOST}:{server.port}", max_bytes=1000).fetch(url) == body
        with pytest.raises(ImageError, match="larger than 999 bytes"):
            make(f"{HOST}:{server.port}", max_bytes=999).fetch(url)


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n", b"x" * 65536),
        (CHUNKED, b"1\r\nx\r\n" * 1000),
        (CHUNKED + b"ffffffffffff\r\n", b"x" * 65536),
        (CHUNKED + b"-1\r\n", b"x" * 65536),  # http.client reads on to the end then
        (CHUNKED + b"-5\r\n", b"x" * 65536),
        (CHUNKED + b"0\r\n", b"a: b\r\n" * 1000),
        (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 1000),
        (b"HTTP/1.1 200 OK\r\na: ", b"x" * 65536),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
        (b"", b"x" * 65536),
    ],
    ids=["no length", "length", "chunks", "one chunk", "chunk -1", "chunk -5", "trailers", "headers", "header", "100", "junk"],
)
def test_endless_answers_end_at_the_limit(server: Server, head: bytes, part: bytes) -> None:
    server.replies["/0"] = endless(head, part)
    start = time.monotonic()
    with pytest.raises(ImageError):
        make(f"{HOST}:{server.port}", timeout=60).fetch(f"http://{HOST}:{server.port}/0")
    assert time.monotonic() - start < 30  # by the limit of bytes, not of time


def test_a_body_that_ends_early_is_not_a_picture(server: Server) -> None:
    server.replies["/0"] = status("200 OK", "Content-Length: 10", body=b"12345")
    server.replies["/1"] = say(CHUNKED, b"a\r\n12345")
    for path in ("/0", "/1"):
        with pytest.raises(ImageError, match="does not answer as it should"):
            make(f"{HOST}:{server.port}").fetch(f"http://{HOST}:{server.port}{path}")


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\na: ", b"HTTP/1.1 200 OK\r\n\r\n", CHUNKED + b"ff\r\n", CHUNKED])
def test_a_slow_drip_ends_at_the_deadline(server: Server, head: bytes) -> None:
    over = threading.Event()

    def drip(sock: socket.socket) -> None:
        sock.sendall(head)
        while not over.wait(0.02):
            sock.sendall(b"0")

    server.replies["/0"] = drip
    start = time.monotonic()
    try:
        with pytest.raises(ImageError, match="not fetched within"):
            make(f"{HOST}:{server.port}", timeout=0.3).fetch(f"http://{HOST}:{server.port}/0")
    finally:
        over.set()
    assert 0.3 <= time.monotonic() - start < 2


def test_the_deadline_holds_over_redirects(server: Server) -> None:
    def late(sock: socket.socket) -> None:
        time.sleep(0.2)
        moved("/0")(sock)

    server.replies["/0"] = late
    with pytest.raises(ImageError, match="not fetched within"):
        make(f"{HOST}:{server.port}", timeout=0.3).fetch(f"http://{HOST}:{server.port}/0")


def test_look_ups_that_hang_end_at_the_deadline_and_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_pictures, "RESOLVING", 1)
    over, begun = threading.Event(), []

    def hanging(host: str) -> list[str]:
        begun.append(host)
        over.wait(10)
        return ["127.0.0.1"]

    pictures = RemotePictures([HOST], max_bytes=1, timeout=0.1, resolve=hanging)
    try:
        for _ in range(3):
            with pytest.raises(ImageError, match="not fetched within"):
                pictures.fetch(f"http://{HOST}/")
        assert len(begun) == 1
    finally:
        over.set()


def test_proxies_of_the_environment_are_not_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert make(f"{HOST}:{server.port}").fetch(f"http://{HOST}:{server.port}/picture.png") == PICTURE


@pytest.fixture
def https() -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "pictures.example.pem")
    server = Server(tls=context)
    yield server
    server.close()


def with_authority(pictures: RemotePictures, authority: Path = TLS / "authority.pem") -> RemotePictures:
    pictures._tls = ssl.create_default_context(cafile=str(authority))
    return pictures


def test_certificates_are_verified_against_the_name(https: Server) -> None:
    port = https.port
    pictures = with_authority(make(f"{HOST}:{port}", f"other.example:{port}", f"127.0.0.1:{port}"))
    assert pictures.fetch(f"https://{HOST}:{port}/picture.png") == PICTURE
    for host in ("other.example", "127.0.0.1"):  # somebody else's certificate
        with pytest.raises(ImageError, match="does not answer as it should"):
            pictures.fetch(f"https://{host}:{port}/picture.png")
    with pytest.raises(ImageError, match="does not answer as it should"):  # an authority that the system does not know
        make(f"{HOST}:{port}").fetch(f"https://{HOST}:{port}/picture.png")
    assert len(https.asked) == 1


def test_a_redirect_does_not_leave_tls(https: Server, server: Server) -> None:
    https.replies["/0"] = moved(f"http://{HOST}:{server.port}/picture.png")
    server.replies["/0"] = moved(f"https://{HOST}:{https.port}/picture.png")
    pictures = with_authority(make(f"{HOST}:{https.port}", f"{HOST}:{server.port}"))
    with pytest.raises(ImageError, match="from https to http"):
        pictures.fetch(f"https://{HOST}:{https.port}/0")
    assert not server.asked
    assert pictures.fetch(f"http://{HOST}:{server.port}/0") == PICTURE


def test_a_handshake_that_does_not_come_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ImageError, match="not fetched within"):
            make(f"{HOST}:{port}", timeout=0.2).fetch(f"https://{HOST}:{port}/")
