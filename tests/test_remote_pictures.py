"""Pictures by URL: which hosts and addresses can be reached, also by redirects. Servers are local, names are made up."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from picture_host import HOST, PICTURE, Server, make, moved, say, whole

from pgfast.errors import ImageError, InputError
from pgfast.server.remote_pictures import RemotePictures, is_public


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


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
