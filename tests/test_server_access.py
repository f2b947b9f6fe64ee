"""Who may ask: API keys, pages of other sites."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_tools import ASK, Running, serving

import pgfast
from pgfast.errors import InputError
from pgfast.server.access import read_keys
from pgfast.server.config import ServerConfig

KEY = "a-secret-key"


@pytest.fixture(scope="module")
def server(demo: pgfast.Engine) -> Iterator[Running]:
    with serving(demo, api_keys=("another", KEY), cors_origins=("https://allowed.example",)) as running:
        yield running


def post(server: Running, **headers: str) -> Any:
    return server.request("POST", "/v1/answer", ASK, {name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize("path", ["/metrics", "/v1/answer", "/v1/nothing"])
def test_what_is_protected(server: Running, path: str) -> None:
    reply = server.request("GET", path)
    assert (reply.status, reply.code, reply.headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert server.request("GET", path, headers={"Authorization": f"Bearer {KEY}"}).status in (200, 404, 405)


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_what_is_open(server: Running, path: str) -> None:
    assert server.request("GET", path).status == 200


@pytest.mark.parametrize("given", [f"Bearer {KEY}", f"bearer  {KEY} ", "Bearer another"])
def test_a_known_key(server: Running, given: str) -> None:
    assert post(server, Authorization=given).status == 200


@pytest.mark.parametrize(
    "given", ["", KEY, f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer \xff"]
)
def test_an_unknown_key(server: Running, given: str) -> None:
    reply = post(server, Authorization=given)
    assert (reply.status, reply.code) == (401, "invalid_api_key")
    assert KEY not in reply.body.decode()


def test_every_key_is_compared(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(len(a)) or compare(a, b))
    post(server, Authorization="Bearer another")  # the first of the two
    assert compared == [32, 32]


def test_keys_are_nowhere_to_be_read(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    post(server, Authorization="Bearer wrong-key-of-mine")
    post(server, Authorization=f"Bearer {KEY}")
    assert KEY not in repr(server.service.config)
    assert KEY not in caplog.text
    assert "wrong-key-of-mine" not in caplog.text
    assert KEY not in server.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"}).body.decode()


def test_pages_of_other_sites(server: Running) -> None:
    key, here = f"Bearer {KEY}", server.url.removeprefix("http://")
    for origin in ("https://evil.example", "null", "", f"http://{here}0", "http://localhost:1"):
        reply = post(server, Authorization=key, Origin=origin)
        assert (reply.status, reply.code) == (403, "origin_not_allowed"), origin
        assert "access-control-allow-origin" not in reply.headers
    for origin in (f"http://{here}", f"https://{here}", f"HTTP://{here}".lower()):
        assert post(server, Authorization=key, Origin=origin).status == 200, origin
    # behind a proxy that speaks TLS
    assert post(server, Authorization=key, Host="my.site", Origin="https://my.site").status == 200
    assert post(server, Authorization=key, Host="My.Site:443", Origin="https://my.site").status == 200
    assert post(server, Authorization=key, Host="my.site", Origin="https://my.site:8443").status == 403
    # reading is the browser's to refuse
    reply = server.request("GET", "/healthz", headers={"Origin": "https://evil.example"})
    assert (reply.status, "access-control-allow-origin" in reply.headers) == (200, False)


def test_an_allowed_site(server: Running) -> None:
    origin = {"Origin": "https://allowed.example"}
    reply = server.request("OPTIONS", "/v1/answer", headers=origin | {"Access-Control-Request-Method": "POST"})
    assert reply.status == 204
    assert reply.headers["access-control-allow-origin"] == "https://allowed.example"
    assert reply.headers["access-control-allow-methods"] == "GET, POST"
    assert reply.headers["access-control-allow-headers"] == "authorization, content-type"
    assert reply.headers["vary"] == "origin"
    for headers, status in (({"Authorization": f"Bearer {KEY}"}, 200), ({}, 401)):  # the page may read the error too
        reply = server.request("POST", "/v1/answer", ASK, headers | origin)
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (status, "https://allowed.example")
    reply = server.request(
        "OPTIONS", "/v1/answer", headers={"Access-Control-Request-Method": "POST", "Origin": "https://x.example"}
    )
    assert "access-control-allow-origin" not in reply.headers


def test_without_keys_everybody_may_ask(demo: pgfast.Engine) -> None:
    with serving(demo) as server:
        assert post(server).status == 200
        assert server.request("GET", "/metrics").status == 200
        assert post(server, Origin="https://allowed.example").status == 403


def test_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# for Anna\nabc\n\n  def  \n#ghi\n")
    assert read_keys(path) == ("abc", "def")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no keys"),
        (b"# nothing\n\n", "has no keys"),
        (b"good\nsecret key\n", "line 2: a key has no spaces"),
        (b"secr\xe9t\n", "is not plain ASCII"),
        (None, "No such file"),
    ],
)
def test_bad_key_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_keys(path)
    assert "secr" not in str(caught.value).replace(str(path), "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cors_origins": ("*",)}, r"'\*' is not an origin"),
        ({"cors_origins": ("https://a.example/",)}, "is not an origin"),
        ({"cors_origins": ("https://A.example",)}, "in small letters"),
        ({"max_queue": -1}, "max_queue is -1: at least 0"),
        ({"timeout": 0}, "timeout is 0: seconds are needed"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"drain_timeout": -1}, "drain_timeout is -1"),
        ({"decoders": 0}, "decoders is 0"),
        ({"max_body": 5}, "max_body is 5"),
        ({"max_body": 2**30}, "max_bodies is"),
    ],
)
def test_bad_settings(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ServerConfig(**settings)
