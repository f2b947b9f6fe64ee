"""Fetching pictures by URL: what is refused, and that nothing else can be reached. Servers are local, names are made up."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import TESTS

from pgfast.errors import ImageError, InputError
from pgfast.server import remote_pictures
from pgfast.server.remote_pictures import RemotePictures, is_public

HOST = "pictures.example"
PICTURE = (TESTS.parent / "pgfast" / "demo" / "blue_circle.png").read_bytes()
TLS = TESTS / "tls"
"""An authority of our own and a certificate of pictures.example, both good for a hundred years."""
Reply = Callable[[socket.socket], None]


def say(*parts: bytes) -> Reply:
    """Send these and close."""

    def reply(sock: socket.socket) -> None:
        for part in parts:
            sock.sendall(part)

    return reply


def status(line: str, *headers: str, body: bytes = b"") -> Reply:
    head = "".join(f"{header}\r\n" for header in (f"HTTP/1.1 {line}", *headers))
    return say(head.encode() + b"\r\n" + body)


def whole(body: bytes, *headers: str) -> Reply:
    return status("200 OK", f"Content-Length: {len(body)}", *headers, body=body)


def moved(target: str, code: str = "302 Found") -> Reply:
    return status(code, f"Location: {target}", "Content-Length: 0")


def endless(head: bytes, part: bytes) -> Reply:
    def reply(sock: socket.socket) -> None:
        sock.sendall(head)
        while True:  # until the client has had enough
            sock.sendall(part)

    return reply


class Server:
    """Answers every path with bytes of our choice, and keeps what it was asked."""

    def __init__(self, address: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.replies: dict[str, Reply] = {"/picture.png": whole(PICTURE)}
        self.asked: list[str] = []
        self._tls = tls
        self._sock = socket.create_server((address, 0))
        self.port = self._sock.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._sock.accept()
                self._threads.append(threading.Thread(target=self._answer, args=(sock,)))
                self._threads[-1].start()

    def _answer(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            with sock, sock.makefile("rb") as file:
                lines = iter(lambda: file.readline().decode(), "\r\n")
                request = "".join(lines)
                self.asked.append(request)
                self.replies[request.split()[1]](sock)
                sock.shutdown(socket.SHUT_WR)
                file.read()  # until the client closes: closing first could take back what it has not read

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._sock.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def make(
    *hosts: str, addresses: Sequence[str] = ("127.0.0.1",), timeout: float = 5, max_bytes: int = 100_000
) -> RemotePictures:
    """Every name means these addresses, and 127.0.0.1 alone counts as public."""
    return RemotePictures(
        hosts,
        max_bytes=max_bytes,
        timeout=timeout,
        resolve=lambda host: addresses,
        is_allowed=lambda address: address == "127.0.0.1",
    )


def test_a_picture_of_an_allowed_host_comes_back_unchanged(server: Server) -> None:
    pictures = make(f"{HOST}:{server.port}")
    assert pictures.fetch(f"http://{HOST}:{server.port}/picture.png") == PICTURE
    (request,) = server.asked
    lines = request.splitlines()
    assert lines[0] == "GET /picture.png HTTP/1.1"
    names = sorted(line.split(":")[0] for line in lines[1:])
    assert names == ["Accept", "Accept-Encoding", "Connection", "Host", "User-Agent"]  # no cookie, no credential
    assert f"Host: {HOST}:{server.port}" in lines
    assert "Accept-Encoding: identity" in lines


@pytest.mark.parametrize("path", ["/a?b=c%20d&e=/", "?only=query", "", "/a#fragment?x"])
def test_path_and_query_arrive_as_they_were_given(server: Server, path: str) -> None:
    wanted = path.split("#")[0]
    wanted = wanted if wanted.startswith("/") else f"/{wanted}"
    server.replies[wanted] = whole(b"x")
    assert make(f"{HOST}:{server.port}").fetch(f"http://{HOST}:{server.port}{path}") == b"x"


@pytest.mark.parametrize("host", ["Pictures.Example", "pictures.example.", "PICTURES.EXAMPLE."])
def test_case_and_the_last_dot_do_not_matter(server: Server, host: str) -> None:
    assert make(f"{HOST}:{server.port}").fetch(f"HTTP://{host}:{server.port}/picture.png") == PICTURE
    assert make(f"{host}:{server.port}").fetch(f"http://{HOST}:{server.port}/picture.png") == PICTURE


REFUSED = [
    "ftp://pictures.example/x",
    "file:///etc/passwd",
    "file://pictures.example/etc/passwd",
    "gopher://pictures.example/x",
    "data:image/png;base64,AAAA",
    "//pictures.example/x",
    "pictures.example/x",
    "",
    "http://",
    "http:///x",
    "http:pictures.example/x",
    "http:/pictures.example/x",
    "http://evil.example/x",
    "http://pictures.example.evil.example/x",
    "http://evil-pictures.example/x",
    "http://a.pictures.example/x",
    "http://example/x",
    "http://pictures.example@evil.example/x",
    "http://user:secret@pictures.example/x",
    "http://@pictures.example/x",
    "http://evil.example#@pictures.example/x",
    "http://evil.example?@pictures.example/x",
    "http://evil.example\\@pictures.example/x",
    "http://pictures.example\\@evil.example/x",
    "http:\\\\pictures.example\\x",
    "http://pictures.example\\.evil.example/x",
    "http://pictures.example/a\\b",
    "http://pictures.example:8080/x",
    "http://pictures.example:443/x",
    "https://pictures.example:80/x",
    "http://pictures.example:0/x",
    "http://pictures.example:/x",
    "http://pictures.example:99999999/x",
    "http://pictures.example:80:80/x",
    "http://pictures.example:80@evil.example/x",
    "http://pictures.example../x",
    "http://.pictures.example/x",
    "http://pictures%2eexample/x",
    "http://pictures.example%00.evil.example/x",
    "http://pictures.example%23.evil.example/x",
    "http://pictures.example /x",
    " http://pictures.example/x",
    "http://pictures.example/x\n",
    "http://pictures.example/x\r\nHost: evil.example\r\n\r\n",
    "http://pictures.example/x\ty",
    "http://pictures.example/x y",
    "http://pic\ntures.example/x",
    "http://pictures.example\x00.evil.example/x",
    "http://pictures\u3002example/x",
    "http://pictures\uff0eexample/x",
    "http://\uff50ictures.example/x",
    "http://picture\u017f.example/x",  # its upper case is S, which a careless comparison takes for s
    "http://pictures.example/ü",
    "http://pictures.example\u2028/x",
    "http://pictures.example\uff0fx",
    "http://[::1]/x",
    "http://[::ffff:127.0.0.1]/x",
    "http://[pictures.example]/x",
    "http://127.0.0.1/x",
    "http://127.1/x",
    "http://2130706433/x",
    "http://0x7f000001/x",
    "http://0177.0.0.1/x",
    "http://0/x",
    "http://169.254.169.254/latest/meta-data/",
    "http://pictures.example/" + "x" * 9000,
]


@pytest.mark.parametrize("url", REFUSED)
def test_any_other_url_is_refused_before_a_name_is_looked_up(url: str) -> None:
    looked_up: list[str] = []
    resolve = lambda host: looked_up.append(host) or ["127.0.0.1"]  # noqa: E731
    pictures = RemotePictures([HOST], max_bytes=1, timeout=5, resolve=resolve, is_allowed=lambda _: True)
    with pytest.raises(ImageError, match=r"URL is not one|not fetched from that host"):
        pictures.fetch(url)
    assert not looked_up


def test_without_hosts_nothing_is_fetched() -> None:
    with pytest.raises(ImageError, match="send the picture itself"):
        make().fetch(f"http://{HOST}/picture.png")


@pytest.mark.parametrize(
    "word",
    [
        *("", ":80", "https://a.example", "a.example/x", "user@a.example", "a.example:", "a.example:0", "a.example:65536"),
        *(
            "a.example:80:81",
            "*.example",
            "a..example",
            "-a.example",
            "b\u00fccher.example",
            "a b",
            "[::1]",
            "a.example:\u00b2",
        ),
        *("127.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "1.2.3.4.5", "256.1.1.1", "a." * 127 + "example"),
    ],
)
def test_a_host_that_is_not_plain_is_refused_at_the_start(word: str) -> None:
    with pytest.raises(InputError, match="HOST or HOST:PORT"):
        make(word)


def test_hosts_have_the_usual_ports_and_a_port_stands_alone() -> None:
    usual = {("a.example", 80), ("a.example", 443)}
    assert make("A.example.")._hosts == usual
    assert make("xn--bcher-kva.example:8443", "203.0.113.9:80")._hosts == {
        ("xn--bcher-kva.example", 8443),
        ("203.0.113.9", 80),
    }


PRIVATE = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1"),
    *("192.0.0.1", "192.0.2.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1"),
    *("240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%lo", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1", "100::1"),
    *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::ffff:0:127.0.0.1"),
    *("2002:7f00:1::1", "2002:a9fe:a9fe::1", "2001:0:7f00:1::1", "2001:db8::1", "3fff::1", "5f00::1"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::a00:1", "64:ff9b:1::808:808"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001::1", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def test_by_default_a_private_address_is_not_connected_to(server: Server) -> None:
    name = f"localhost:{server.port}"
    pictures = RemotePictures([name], max_bytes=10**6, timeout=5)
    with pytest.raises(ImageError, match="does not answer as it should"):
        pictures.fetch(f"http://{name}/picture.png")
    pictures = RemotePictures([f"127.0.0.1:{server.port}"], max_bytes=10**6, timeout=5)
    with pytest.raises(ImageError, match="does not answer as it should"):
        pictures.fetch(f"http://127.0.0.1:{server.port}/picture.png")
    assert not server.asked


def test_one_private_address_among_others_refuses_the_host(server: Server) -> None:
    pictures = make(f"{HOST}:{server.port}", addresses=["127.0.0.1", "10.0.0.1"])
    with pytest.raises(ImageError, match="does not answer as it should"):
        pictures.fetch(f"http://{HOST}:{server.port}/picture.png")
    assert not server.asked


def test_a_name_is_looked_up_once_so_that_it_cannot_change_after_the_check(server: Server) -> None:
    answers = [["127.0.0.1"], ["10.0.0.1"]]
    looked_up: list[str] = []

    def rebinding(host: str) -> list[str]:
        looked_up.append(host)
        return answers[len(looked_up) - 1]

    pictures = RemotePictures(
        [f"{HOST}:{server.port}"],
        max_bytes=10**6,
        timeout=5,
        resolve=rebinding,
        is_allowed=lambda address: address == "127.0.0.1",
    )
    url = f"http://{HOST}:{server.port}/picture.png"
    assert pictures.fetch(url) == PICTURE
    assert looked_up == [HOST]
    with pytest.raises(ImageError, match="does not answer as it should"):
        pictures.fetch(url)
    assert len(server.asked) == 1


def test_a_client_cannot_tell_why_a_host_is_not_reached(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def unknown(host: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    url, messages = f"http://{HOST}:{port}/", set()
    for resolve in (unknown, lambda host: [], lambda host: ["10.0.0.1"], lambda host: ["127.0.0.1"]):
        pictures = make(f"{HOST}:{port}")
        pictures._resolve = resolve
        with caplog.at_level("INFO"), pytest.raises(ImageError) as error:
            pictures.fetch(url)
        messages.add(str(error.value))
    assert len(messages) == 1
    for reason in ("not known", "no address", "10.0.0.1 is not public", "refused"):
        assert reason in caplog.text


def test_the_next_address_is_tried_when_one_does_not_answer(server: Server) -> None:
    pictures = make(f"{HOST}:{server.port}", addresses=["127.0.0.2", "127.0.0.1"])
    pictures._is_allowed = lambda address: True
    assert pictures.fetch(f"http://{HOST}:{server.port}/picture.png") == PICTURE


@pytest.mark.parametrize("code", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_followed(server: Server, code: str) -> None:
    server.replies |= {"/a/1": moved("2", code), "/a/2": moved(f"//{HOST}:{server.port}/3", code)}
    server.replies |= {"/3": moved("/picture.png", code)}
    assert make(f"{HOST}:{server.port}").fetch(f"http://{HOST}:{server.port}/a/1") == PICTURE


def test_a_fourth_redirect_is_not_followed(server: Server) -> None:
    server.replies |= {f"/{i}": moved(f"/{i + 1}") for i in range(9)}
    with pytest.raises(ImageError, match="more than 3 times"):
        make(f"{HOST}:{server.port}").fetch(f"http://{HOST}:{server.port}/0")
    assert len(server.asked) == 4


@pytest.mark.parametrize("url", ["", "http://evil.example/x", "file:///etc/passwd", "//evil.example/x", "http://[::1]/x"])
def test_redirects_lead_nowhere_that_is_not_allowed(server: Server, url: str) -> None:
    server.replies["/0"] = moved(url)
    with pytest.raises(ImageError):
        make(f"{HOST}:{server.port}").fetch(f"http://{HOST}:{server.port}/0")


@pytest.mark.parametrize("target", ["/a b", "/a\\b", "//pictures.example\\@evil.example", "/\xfc", "/\t", "http://127.0.0.1/"])
def test_odd_redirects_are_refused(server: Server, target: str) -> None:
    server.replies["/0"] = say(b"HTTP/1.1 302 Found\r\nLocation: " + target.encode("latin-1") + b"\r\n\r\n")
    server.replies["/a"] = server.replies["/"] = whole(b"no")
    with pytest.raises(ImageError):
        make(f"{HOST}:{server.port}").fetch(f"http://{HOST}:{server.port}/0")
    assert len(server.asked) == 1


def test_a_redirect_to_a_host_with_a_private_address_is_refused(server: Server) -> None:
    server.replies["/0"] = moved(f"http://inside.example:{server.port}/picture.png")
    pictures = make(f"{HOST}:{server.port}", f"inside.example:{server.port}")
    pictures._resolve = {HOST: ["127.0.0.1"], "inside.example": ["10.0.0.1"]}.__getitem__
    with pytest.raises(ImageError, match="does not answer as it should"):
        pictures.fetch(f"http://{HOST}:{server.port}/0")
    assert len(server.asked) == 1


@pytest.mark.parametrize("line", ["201 Created", "204 No Content", "206 Partial", "304 Not Modified", "404 No", "500 Oh"])
def test_only_200_is_an_answer(server: Server, line: str) -> None:
    server.replies["/0"] = status(line, "Content-Length: 0")
    with pytest.raises(ImageError, match=f"status {line[:3]}"):
        make(f"{HOST}:{server.port}").fetch(f"http://{HOST}:{server.port}/0")


def test_a_compressed_body_is_refused(server: Server) -> None:
    server.replies["/0"] = whole(b"x", "Content-Encoding: gzip")
    with pytest.raises(ImageError, match="compressed"):
        make(f"{HOST}:{server.port}").fetch(f"http://{HOST}:{server.port}/0")


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


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
