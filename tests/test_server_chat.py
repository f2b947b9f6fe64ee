"""The OpenAI-compatible endpoint, asked by OpenAI's own client over a socket; the engine is the reference."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from server_tools import PICTURE, QUESTION, serving
from test_token_texts import GEMMA, PIECES

from pgfast import Engine, GenerateOptions
from pgfast.prompt import cut_at_stop
from pgfast.server.chat_logprobs import tokens_of
from pgfast.token_texts import TokenTexts

URI = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
WILD = {"temperature": 50.0, "seed": 7}
"""Sampling from nearly everything: many tokens of nonsense, the same ones each time."""


@pytest.fixture(scope="module")
def address(demo: Engine) -> Iterator[str]:
    with serving(demo) as running:
        yield f"{running.url}/v1"


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key="none is needed", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    (card,) = client.models.list()
    return card.id


def messages(text: str = QUESTION, url: str = URI) -> list[Any]:
    return [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]}]


def streamed(client: openai.OpenAI, **request: Any) -> list[ChatCompletionChunk]:
    with client.chat.completions.create(stream=True, **request) as stream:
        return list(stream)


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def tokens_of_stream(chunks: list[ChatCompletionChunk]) -> list[Any]:
    found = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    return [token for logprobs in found if logprobs for token in logprobs.content or []]


def test_an_answer_is_the_engines(client: openai.OpenAI, model: str, demo: Engine) -> None:
    expected = demo.answer(PICTURE, QUESTION)
    got = client.chat.completions.create(model=model, messages=messages(), logprobs=True)
    (choice,) = got.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (expected.text, "assistant", "stop")
    assert choice.model_extra is not None
    assert choice.model_extra["confidence"] == pytest.approx(expected.confidence, rel=1e-6)
    assert choice.logprobs is not None
    (token,) = choice.logprobs.content or []
    assert (token.token, bytes(token.bytes or [])) == ("blue", b"blue")
    assert token.logprob == pytest.approx(expected.token_logprobs[0], rel=1e-3)
    assert (got.model, got.object) == (model, "chat.completion")
    assert got.id.startswith("chatcmpl-")
    assert got.system_fingerprint == f"fp_{demo.manifest.digest()[:12]}"


def test_usage_counts_the_picture_and_every_token(client: openai.OpenAI, model: str, demo: Engine) -> None:
    usage = client.chat.completions.create(model=model, messages=messages()).usage
    assert usage is not None
    image = demo.manifest.dimensions.num_image_tokens
    text = len(["<bos>", "answer", "en", "what", "color", "is", "the", "shape", "?", "\\n"])  # the demo's tokens are words
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (image + text, 2, image + text + 2)
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.image_tokens, usage.prompt_tokens_details.text_tokens) == (image, text)


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI, model: str, demo: Engine) -> None:
    expected = demo.answer(PICTURE, QUESTION, options=GenerateOptions(max_new_tokens=30, **WILD))
    assert len(expected.token_ids) > 10
    request: dict[str, Any] = {"model": model, "messages": messages(), "logprobs": True, "max_completion_tokens": 30, **WILD}
    chunks = streamed(client, stream_options={"include_usage": True}, **request)
    whole = client.chat.completions.create(**request)
    assert text_of(chunks) == expected.text == whole.choices[0].message.content
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 5
    tokens = tokens_of_stream(chunks)
    assert whole.choices[0].logprobs is not None
    assert tokens == whole.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == expected.text
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == expected.text
    assert {round(token.logprob, 3) for token in tokens} <= {round(logprob, 3) for logprob in expected.token_logprobs}
    for chunk in chunks:  # each piece of text comes with its own tokens
        if chunk.choices and chunk.choices[0].delta.content:
            assert "".join(token.token for token in tokens_of_stream([chunk])) == chunk.choices[0].delta.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + [expected.finish_reason]
    assert chunks[-2].choices[0].model_extra is not None
    assert chunks[-2].choices[0].model_extra["confidence"] == pytest.approx(expected.confidence, rel=1e-4)
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_asking_a_stream_has_no_usage_and_no_logprobs(client: openai.OpenAI, model: str) -> None:
    chunks = streamed(client, model=model, messages=messages())
    assert text_of(chunks) == "blue"
    assert all(chunk.usage is None and chunk.choices[0].logprobs is None for chunk in chunks)


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_texts_are_cut_off_with_their_tokens(client: openai.OpenAI, model: str, demo: Engine, as_list: bool) -> None:
    words = demo.answer(PICTURE, QUESTION, options=GenerateOptions(max_new_tokens=30, **WILD)).text.split()
    stop: Any = next(word for word in words[3:] if len(word) > 2)[:2]  # within a token
    options = GenerateOptions(max_new_tokens=30, stop=(stop,), **WILD)
    expected = demo.answer(PICTURE, QUESTION, options=options).text
    request: dict[str, Any] = {"model": model, "messages": messages(), "logprobs": True, "max_tokens": 30, **WILD}
    request["stop"] = [stop, "never said"] if as_list else stop
    whole = client.chat.completions.create(**request).choices[0]
    chunks = streamed(client, **request)
    assert whole.message.content == expected == text_of(chunks)
    assert stop not in expected
    assert whole.logprobs is not None
    assert whole.finish_reason == "stop"
    assert "".join(token.token for token in whole.logprobs.content or []) == expected
    assert tokens_of_stream(chunks) == whole.logprobs.content


def test_choices_come_as_an_extra(client: openai.OpenAI, model: str, demo: Engine) -> None:
    expected = demo.answer(PICTURE, QUESTION, choices=["red", "blue"])
    extra = {"choices": ["red", "blue"]}
    choice = client.chat.completions.create(model=model, messages=messages(), logprobs=True, extra_body=extra).choices[0]
    chunks = streamed(client, model=model, messages=messages(), logprobs=True, extra_body=extra)
    assert choice.message.content == text_of(chunks) == expected.text
    for found in (choice, chunks[-1].choices[0]):
        assert found.model_extra is not None
        assert found.model_extra["choices"] == pytest.approx(expected.choices, rel=1e-3)
    assert choice.logprobs is not None
    assert [token.token for token in choice.logprobs.content or []] == ["blue"]
    assert tokens_of_stream(chunks) == choice.logprobs.content


def test_other_extras_reach_the_engine(client: openai.OpenAI, model: str, demo: Engine) -> None:
    raw = client.chat.completions.create(
        model=model, messages=messages(f"answer en {QUESTION}"), extra_body={"raw_prompt": True}
    )
    assert raw.usage == client.chat.completions.create(model=model, messages=messages()).usage
    expected = demo.answer(PICTURE, QUESTION, options=GenerateOptions(top_k=3, max_new_tokens=8, **WILD))
    with pytest.raises(openai.BadRequestError, match="not trained with the language 'is': one of en"):
        client.chat.completions.create(model=model, messages=messages(), extra_body={"language": "is"})
    extra = {"language": "en", "top_k": 3}
    got = client.chat.completions.create(model=model, messages=messages(), max_tokens=8, extra_body=extra, **WILD)
    assert got.choices[0].message.content == expected.text


def test_the_token_limit_is_an_upper_bound(client: openai.OpenAI, model: str) -> None:
    short = client.chat.completions.create(model=model, messages=messages(), max_tokens=1, logprobs=True)
    assert (short.choices[0].finish_reason, short.choices[0].message.content) == ("length", "blue")
    assert client.chat.completions.create(model=model, messages=messages(), max_tokens=4096).choices[0].finish_reason == "stop"


NEUTRAL: dict[str, Any] = {
    "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"},
    "modalities": ["text"], "tools": [], "tool_choice": "none", "top_logprobs": 0, "logprobs": False, "user": "me",
    "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "top_p": 1.0, "temperature": 0, "stream": False,
    "stop": None, "parallel_tool_calls": False, "verbosity": "medium", "seed": 3, "safety_identifier": "x",
}  # fmt: skip


def test_keys_that_change_nothing_are_accepted(client: openai.OpenAI, model: str) -> None:
    assert client.chat.completions.create(model=model, messages=messages(), **NEUTRAL).choices[0].message.content == "blue"


def image(url: str = URI) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


TEXT = {"type": "text", "text": QUESTION}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 2}, "n", "one answer"),
    ({"presence_penalty": 0.5}, "presence_penalty", "penalties"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "cannot call tools"),
    ({"response_format": {"type": "json_object"}}, "response_format", "plain text"),
    ({"logprobs": True, "top_logprobs": 3}, "top_logprobs", "only the chosen tokens"),
    ({"extra_body": {"colour": 1}}, "colour", "not permitted"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "", "two names of one limit"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": ""}, "", "empty text"),
    ({"stream_options": {"include_usage": True}}, "", "stream: true"),
    ({"extra_body": {"choices": []}}, "choices", "at least 1"),
    ({"extra_body": {"choices": ["blue", "blue"]}}, "", "apart"),
    ({"messages": []}, "messages", "one user message"),
    ({"messages": [{"role": "system", "content": "be brief"}, *messages()]}, "messages", "no instructions"),
    ({"messages": [*messages(), {"role": "assistant", "content": "blue"}, *messages()]}, "messages", "without a history"),
    ({"messages": [{"role": "assistant", "content": "blue"}]}, "messages", "one user message"),
    ({"messages": [{"role": "user", "content": QUESTION}]}, "messages.0.content", "questions about a picture"),
    ({"messages": [{"role": "user", "content": [TEXT]}]}, "messages.0.content", "one image_url part is needed, there is none"),
    ({"messages": [{"role": "user", "content": [TEXT, image(), image()]}]}, "messages.0.content", "there are 2"),
    ({"messages": [{"role": "user", "content": [image()]}]}, "messages.0.content", "one text part is needed, there is none"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0", "input_audio"),
    ({"messages": messages(" ")}, "", "question is empty"),
    ({"messages": messages("what is <image>?")}, "", "a marker of the model"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "param", "message"), REFUSED, ids=[str(case[0])[:40] for case in REFUSED])
def test_what_cannot_be_honoured_is_refused(
    client: openai.OpenAI, model: str, change: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    if stream and "stream_options" in change:
        return
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        client.chat.completions.create(**{"model": model, "messages": messages(), "stream": stream, **change})
    assert raised.value.type == "invalid_request_error"
    assert raised.value.code in ("invalid_request", "input_error", "prompt_error")
    assert (raised.value.param or "") == param


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,not base64!",
        "data:image/png;base64," + base64.b64encode(b"not a picture").decode(),
        "data:image/png;base64," + base64.b64encode(PICTURE[:200]).decode(),
        "data:,",
        "",
        "https://example.com/cat.png",
        "file:///etc/passwd",
    ],
)
def test_a_bad_picture_is_a_bad_request(client: openai.OpenAI, model: str, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=model, messages=messages(url=url))
    assert raised.value.code == "image_error"


def test_models_are_listed_and_others_are_not_found(client: openai.OpenAI, model: str) -> None:
    card = client.models.retrieve(model)
    assert [card] == list(client.models.list())
    assert (card.object, card.owned_by) == ("model", "pgfast")
    for ask in (
        lambda: client.models.retrieve("gpt-4o"),
        lambda: client.chat.completions.create(model="gpt-4o", messages=messages()),
    ):
        with pytest.raises(openai.NotFoundError, match=model) as raised:
            ask()
        assert raised.value.code == "model_not_found"


def test_the_asynchronous_client_asks_together(address: str, model: str, demo: Engine) -> None:
    questions = [QUESTION, "is there a circle?", "what shape is in the image?"] * 4

    async def ask() -> list[ChatCompletion]:
        async with openai.AsyncOpenAI(base_url=address, api_key="-", max_retries=0) as client:
            create = client.chat.completions.create
            return await asyncio.gather(*(create(model=model, messages=messages(question)) for question in questions))

    answers = [answer.choices[0].message.content for answer in asyncio.run(ask())]
    assert answers == [demo.answer(PICTURE, question).text for question in questions]
    assert len(set(answers)) == 3


def test_a_picture_may_come_from_an_address_that_is_allowed(demo: Engine, model: str) -> None:
    asked = []

    def fetch(url: str) -> bytes:
        asked.append(url)
        return PICTURE

    with serving(demo) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="-", max_retries=0) as client:
        running.service.fetch = fetch
        got = client.chat.completions.create(model=model, messages=messages(url="HTTPS://pictures.example/a.png?b=c"))
    assert got.choices[0].message.content == "blue"
    assert asked == ["HTTPS://pictures.example/a.png?b=c"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b'{"a":' * 50_000, "recursion limit"),
        (b"[]", "object"),
        (b'{"model": "m", "messages": "\xff"}', "JSON"),
        (b'{"model": 1e999, "messages": []}', "model"),
        (b'{"model": "demo_checkpoint", "messages": [[]]}', "messages.0"),
        (b'{"model": "demo_checkpoint", "messages": [{"role": ["user"], "content": {}}]}', "messages.0"),
    ],
)
def test_a_body_that_is_no_request_is_a_bad_request(address: str, body: bytes, message: str) -> None:
    response = httpx2.post(f"{address}/chat/completions", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (400, "invalid_request", "invalid_request_error")
    assert message in error["message"]
    assert httpx2.post(f"{address}/chat/completions", content=body).status_code == 415


@given(
    st.lists(st.integers(4, len(PIECES) + 255) | st.sampled_from([4, 5, 6, 7]), max_size=16),
    st.sampled_from(["", "a", "ue", " c", "\n", "\u00e4"]),
)
def test_tokens_add_up_to_what_is_left_of_the_text(ids: list[int], stop: str) -> None:
    whole = GEMMA.decode(ids)
    text = cut_at_stop(whole, [stop] if stop else []).strip()
    logprobs = [-float(place) for place in range(len(ids))]
    tokens = tokens_of(TokenTexts(GEMMA), ids, logprobs, text)
    assert "".join(token.token for token in tokens) == text
    assert b"".join(bytes(token.bytes) for token in tokens) == text.encode()
    assert all(math.isfinite(token.logprob) for token in tokens)
    places = [token.logprob for token in tokens]
    assert places == sorted(places, reverse=True)
