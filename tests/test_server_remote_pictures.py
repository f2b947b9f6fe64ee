"""Pictures by URL through the server: both APIs, what is off by default, and how many at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from test_remote_pictures import HOST, PICTURE, Server, make, whole

from pgfast.engine import Engine
from pgfast.errors import InputError
from pgfast.server import service as service_module
from pgfast.server.app import build_app
from pgfast.server.config import ServerConfig
from pgfast.server.service import AnswerService

QUESTION = "what color is the shape?"


@pytest.fixture
def host() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def answer_body(url: str) -> dict[str, Any]:
    return {"image": {"url": url}, "question": QUESTION}


def chat_body(url: str, model: str) -> dict[str, Any]:
    parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": model, "messages": [{"role": "user", "content": parts}]}


async def post(app: Any, path: str, *bodies: dict[str, Any]) -> list[httpx2.Response]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://server") as client:
        return list(await asyncio.gather(*(client.post(path, json=body) for body in bodies)))


def app_with(engine: Engine, *hosts: str, **settings: Any) -> tuple[Any, AnswerService]:
    app = build_app(engine, ServerConfig(allow_url_hosts=hosts, **settings))
    return app, app.state.service


def test_both_apis_answer_about_a_picture_of_an_allowed_host(demo: Engine, host: Server) -> None:
    url = f"http://{HOST}:{host.port}/picture.png"
    app, service = app_with(demo, f"{HOST}:{host.port}")
    service.fetch = make(f"{HOST}:{host.port}").fetch
    (answer,) = asyncio.run(post(app, "/v1/answer", answer_body(url)))
    assert (answer.status_code, answer.json()["text"]) == (200, "blue")
    assert answer.json()["image"] == {"width": 640, "height": 640}
    (chat,) = asyncio.run(post(app, "/v1/chat/completions", chat_body(url, service.model)))
    assert chat.status_code == 200
    assert chat.json()["choices"][0]["message"]["content"] == "blue"
    assert len(host.asked) == 2
    service.close()


@pytest.mark.parametrize("path", ["/v1/answer", "/v1/chat/completions"])
def test_by_default_nothing_is_fetched_and_private_addresses_never(demo: Engine, host: Server, path: str) -> None:
    url = f"http://localhost:{host.port}/picture.png"
    for hosts in ((), (f"localhost:{host.port}",), ("other.example",)):
        app, service = app_with(demo, *hosts)
        body = answer_body(url) if path == "/v1/answer" else chat_body(url, service.model)
        (response,) = asyncio.run(post(app, path, body))
        service.close()
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "image_error"
        assert "127.0.0.1" not in response.text
    assert not host.asked


def test_a_file_that_is_no_picture_is_the_clients_mistake(demo: Engine, host: Server) -> None:
    host.replies["/text"] = whole(b"no picture")
    host.replies["/large"] = whole(PICTURE + bytes(4096))
    app, service = app_with(demo, f"{HOST}:{host.port}")
    service.fetch = make(f"{HOST}:{host.port}", max_bytes=4096).fetch
    bodies = [answer_body(f"http://{HOST}:{host.port}/{path}") for path in ("text", "large")]
    for response, message in zip(asyncio.run(post(app, "/v1/answer", *bodies)), ("not a picture", "larger than"), strict=True):
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "image_error"
        assert message in response.json()["error"]["message"]
    service.close()


def test_only_so_many_are_fetched_at_a_time(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "FETCHES", 2)
    app, service = app_with(demo)
    full, running, most = threading.Barrier(2), 0, 0
    counting = threading.Lock()

    def fetch(url: str) -> bytes:
        nonlocal running, most
        with counting:
            running += 1
            most = max(most, running)
        full.wait(10)  # two are always here together
        with counting:
            running -= 1
        return PICTURE

    service.fetch = fetch
    responses = asyncio.run(post(app, "/v1/answer", *[answer_body(f"http://{HOST}/{i}") for i in range(6)]))
    assert [response.json()["text"] for response in responses] == ["blue"] * 6
    assert most == 2
    service.close()


def test_a_host_that_is_misspelt_stops_the_start() -> None:
    with pytest.raises(InputError, match="HOST or HOST:PORT"):
        ServerConfig(allow_url_hosts=("https://pictures.example/",))


def test_limits_of_the_server_are_those_of_its_fetches(demo: Engine) -> None:
    service = AnswerService(demo, ServerConfig(allow_url_hosts=(HOST,), max_body=5000, timeout=3.0))
    pictures: Any = service.fetch.__self__  # type: ignore[union-attr]
    assert (pictures._max_bytes, pictures._timeout) == (5000, 3.0)
    service.close()
