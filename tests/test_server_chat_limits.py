"""OpenAI's client where the server says no, breaks, or is left: keys, overload, time, failures."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from http_server import serving

import pgfast
from pgfast import Engine
from pgfast.demo import __file__ as demo_file
from pgfast.server.service import AnswerService

MODEL = "demo_checkpoint"
URI = "data:image/png;base64," + base64.b64encode((Path(demo_file).parent / "blue_circle.png").read_bytes()).decode()
MESSAGES: list[Any] = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "what color is the shape?"}, {"type": "image_url", "image_url": {"url": URI}}],
    }
]
WILD: dict[str, Any] = {"temperature": 50.0, "seed": 7, "max_tokens": 90}
"""Many tokens of nonsense."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    """One that may be held up and broken."""
    with pgfast.load(provider="cpu") as loaded:
        yield loaded


@pytest.fixture
def gate(engine: Engine) -> Iterator[threading.Event]:
    """The engine stands still after its next run until this is set; `hold` begins it."""
    event = threading.Event()
    yield event
    event.set()


def hold(engine: Engine, gate: threading.Event) -> None:
    def wait(rows: int) -> None:
        assert gate.wait(30)

    engine.on_step = wait  # the server's metrics had it


@contextlib.contextmanager
def connected(engine: Engine, **settings: Any) -> Iterator[tuple[openai.OpenAI, AnswerService]]:
    with (
        serving(engine, **settings) as (address, service),
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client,
    ):
        yield client, service


def ask(client: openai.OpenAI) -> str | None:
    return client.chat.completions.create(model=MODEL, messages=MESSAGES).choices[0].message.content


def test_a_failure_in_the_middle_of_a_stream_is_an_error_of_the_client(engine: Engine) -> None:
    steps, reading = itertools.count(), threading.Event()

    def fail(rows: int) -> None:
        if next(steps) == 3:
            assert reading.wait(30)
            raise RuntimeError("the device fell off the bus")

    with connected(engine) as (client, _):
        engine.on_step = fail
        stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **WILD)
        assert next(stream).choices[0].delta.role == "assistant"
        reading.set()
        with pytest.raises(openai.APIError) as raised:
            list(stream)
        assert not isinstance(raised.value, openai.APIStatusError)
        assert raised.value.code == "internal_error"
        assert "bus" not in raised.value.message
        engine.on_step = None
        assert ask(client) == "blue"


def test_leaving_a_stream_frees_its_place(engine: Engine) -> None:
    with connected(engine) as (client, _):
        step = threading.Semaphore(3)
        engine.on_step = lambda rows: step.acquire() and None
        stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **WILD)
        next(stream)
        assert engine.load_figures().running == 1
        stream.close()
        more = 0
        while engine.load_figures().running and more < 90:
            step.release()
            more += 1
            time.sleep(0.01)  # the server has to hear of it
        step.release(1000)
        assert more < 45


def test_a_wrong_key_is_an_authentication_error(engine: Engine) -> None:
    with connected(engine, api_keys=("right",)) as (client, _):
        for key in ("wrong", "right2"):
            wrong = client.with_options(api_key=key)
            for refused in (wrong.models.list, lambda wrong=wrong: ask(wrong)):
                with pytest.raises(openai.AuthenticationError) as raised:
                    refused()
                assert raised.value.code == "invalid_api_key"
        assert ask(client.with_options(api_key="right")) == "blue"


def test_too_many_requests_are_rate_limited_and_the_others_answered(engine: Engine, gate: threading.Event) -> None:
    slots = engine.load_figures().slots
    refused: list[openai.RateLimitError] = []

    async def ask_one(client: openai.AsyncOpenAI) -> str | None:
        try:
            answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        except openai.RateLimitError as error:
            refused.append(error)
            if len(refused) == 4:
                gate.set()
            return None
        return answer.choices[0].message.content

    async def ask_all(address: str) -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client:
            return await asyncio.gather(*(ask_one(client) for _ in range(slots + 4)))

    with serving(engine, max_queue=0) as (address, _):
        hold(engine, gate)
        answers = asyncio.run(ask_all(address))
    assert (answers.count("blue"), answers.count(None)) == (slots, 4)
    assert {error.code for error in refused} == {"overloaded"}
    assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_given_up(engine: Engine, gate: threading.Event, stream: bool) -> None:
    with connected(engine, timeout=0.5) as (client, service):
        hold(engine, gate)
        with pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
        assert (raised.value.status_code, raised.value.code) == (504, "timeout")
        wait_until_empty(service)
        gate.set()
        assert ask(client) == "blue"


def test_a_client_that_waits_no_longer_gives_its_place_back(engine: Engine, gate: threading.Event) -> None:
    with connected(engine) as (client, service):
        hold(engine, gate)
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.3))
        wait_until_empty(service)  # though the engine stands still
        gate.set()
        assert ask(client) == "blue"


def wait_until_empty(service: AnswerService) -> None:
    for _ in range(1000):
        if service.admission.taken == 0:
            return
        time.sleep(0.01)
    raise AssertionError("a place is still taken")
