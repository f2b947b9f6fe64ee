"""POST /v1/answer: what it takes, what it gives, what it says about bad input."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from server_tools import ASK, PICTURE, QUESTION, Running, serving

import pgfast


@pytest.fixture(scope="module")
def server(demo: pgfast.Engine) -> Iterator[Running]:
    with serving(demo) as running:
        yield running


def form(*parts: tuple[str, bytes, bool]) -> dict[str, Any]:
    lines = b""
    for name, content, is_file in parts:
        filename = '; filename="a.png"' if is_file else ""
        lines += f'--xx\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode() + content + b"\r\n"
    return {"body": lines + b"--xx--\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=xx"}}


def test_an_answer_is_the_engine_s_own(server: Running, demo: pgfast.Engine) -> None:
    expected = demo.answer(PICTURE, QUESTION)
    reply = server.ask()
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-content-type-options"] == "nosniff"
    found = reply.json
    assert found["text"] == expected.text == "blue"
    assert found["confidence"] == pytest.approx(expected.confidence, rel=1e-4)
    assert found["token_logprobs"] == pytest.approx(expected.token_logprobs, abs=1e-4)
    assert found["finish_reason"] == "stop"
    assert found["choices"] is None
    assert found["image"] == {"width": 640, "height": 640}
    assert found["model"] == "demo_checkpoint"
    assert found["id"].startswith("answer-")
    assert found["id"] != server.ask().json["id"]


def test_the_times_add_up_to_the_total(server: Running) -> None:
    times = server.ask(image=base64.b64encode(PICTURE + b" ").decode()).json["timings"]  # not in the cache
    assert times["vision"] > 0
    assert times["prefill"] > 0
    assert times["ttft"] <= times["total"]
    parts = sum(times[name] for name in ("preprocess", "vision", "prefill", "decode", "queue"))
    assert parts == pytest.approx(times["total"], abs=1e-6)
    assert server.ask().json["timings"]["vision"] == 0  # from the cache


def test_options_reach_the_engine(server: Running, demo: pgfast.Engine) -> None:
    options = pgfast.GenerateOptions(max_new_tokens=1, temperature=0.9, top_p=0.8, top_k=5, seed=3, stop=("x",))
    wanted = demo.answer(PICTURE, QUESTION, options=options)
    found = server.ask(max_new_tokens=1, temperature=0.9, top_p=0.8, top_k=5, seed=3, stop=["x"]).json
    assert (found["text"], found["finish_reason"]) == (wanted.text, "length")
    assert server.ask(stop=["lue"]).json["text"] == "b"


def test_choices_and_a_raw_prompt(server: Running, demo: pgfast.Engine) -> None:
    found = server.ask(choices=["red", "blue"]).json
    assert found["text"] == "blue"
    assert found["choices"] == pytest.approx(demo.answer(PICTURE, QUESTION, choices=["red", "blue"]).choices, abs=1e-4)
    raw = server.ask(question=None, prompt=f"answer en {QUESTION}").json
    assert raw["text"] == "blue"


def test_a_data_uri_and_a_large_picture(server: Running) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(PICTURE)).convert("RGB").resize((800, 700)).save(file, "BMP")  # over the size that threads take on
    text = "data:image/bmp;base64," + base64.b64encode(file.getvalue()).decode()
    found = server.ask(image=text).json
    assert (found["text"], found["image"]) == ("blue", {"width": 800, "height": 700})


def test_a_form(server: Running) -> None:
    fields = [("image", PICTURE, True), ("question", QUESTION.encode(), False)]
    found = server.request("POST", "/v1/answer", **form(*fields)).json
    assert found["text"] == "blue"
    more = [("choices", b"red", False), ("choices", b"blue", False), ("language", b"en", False)]
    found = server.request("POST", "/v1/answer", **form(*fields, *more)).json
    assert list(found["choices"]) == ["red", "blue"]
    numbers = [("max_new_tokens", b"1", False), ("temperature", b"0.5", False), ("seed", b"1", False)]
    assert server.request("POST", "/v1/answer", **form(*fields, *numbers)).json["finish_reason"] == "length"
    in_text = [("image", base64.b64encode(PICTURE), False), ("question", QUESTION.encode(), False)]
    assert server.request("POST", "/v1/answer", **form(*in_text)).json["text"] == "blue"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("question", b"a?", False)], "image: Field required"),
        ([("image", PICTURE, True), ("nonsense", b"1", False)], "nonsense: Extra inputs are not permitted"),
        ([("image", PICTURE, True), ("question", b"a", False), ("question", b"b", False)], "question: it is there twice"),
        ([("image", PICTURE, True), ("question", b"\xff", False)], "a field of the form is not UTF-8"),
        ([("image", PICTURE, True), ("image", PICTURE, True)], "image: it is there twice"),
        ([("image", PICTURE, True), ("question", b"a", False), ("seed", b"x", False)], "seed: Input should be a valid integer"),
        ([("", PICTURE, True)], "the multipart form cannot be read: a field has no name"),
        ([("stop", b"a", False)] * 401, "the multipart form cannot be read: it has more than 400 fields"),
    ],
)
def test_bad_forms(server: Running, parts: list[tuple[str, bytes, bool]], message: str) -> None:
    reply = server.request("POST", "/v1/answer", **form(*parts))
    assert (reply.status, reply.code) == (400, "invalid_request")
    assert reply.json["error"]["message"].startswith(message)


def test_broken_forms(server: Running) -> None:
    whole = form(("image", PICTURE, True), ("question", b"a", False))
    for body, headers in (
        (whole["body"][:-9], whole["headers"]),
        (whole["body"], {"Content-Type": "multipart/form-data"}),
        (whole["body"], {"Content-Type": "multipart/form-data; boundary=yy"}),
        (b"", whole["headers"]),
    ):
        reply = server.request("POST", "/v1/answer", body, headers)
        assert (reply.status, reply.code) == (400, "invalid_request")
        assert reply.json["error"]["message"].startswith("the multipart form cannot be read: ")


def events(body: bytes) -> list[tuple[str, Any]]:
    found = []
    for block in body.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_stream_gives_pieces_and_the_whole(server: Running) -> None:
    reply = server.request("POST", "/v1/answer?stream=1", {**ASK, "question": "what is in the picture?"})
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = events(reply.body)
    *pieces, (last, answer) = found
    assert last == "answer"
    assert {name for name, _ in pieces} == {"piece"}
    assert "".join(data["text"] for _, data in pieces).strip() == answer["text"]
    assert answer.keys() == server.ask().json.keys()
    (name, data) = events(server.request("POST", "/v1/answer?stream=1", {**ASK, "choices": ["red", "blue"]}).body)[-1]
    assert (name, data["text"]) == ("answer", "blue")


def test_a_stream_s_errors_before_the_first_piece_have_a_status(server: Running) -> None:
    reply = server.request("POST", "/v1/answer?stream=1", {**ASK, "image": base64.b64encode(b"no picture").decode()})
    assert (reply.status, reply.code) == (400, "image_error")


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"image": None}, "invalid_request", "image: Field required"),
        ({"image": 5}, "invalid_request", "image"),
        ({"image": {"url": 5}}, "invalid_request", "image"),
        ({"image": {"url": "http://a/b.png"}}, "image_error", "pictures are not fetched from URLs here"),
        ({"image": "?"}, "image_error", "the picture is neither base64 nor a data URI"),
        ({"image": "a" * 5_000_001}, "image_error", "the picture is neither base64 nor a data URI"),
        ({"image": "data:text/html;base64,AAAA"}, "image_error", "a data URI of a picture starts with"),
        ({"image": ""}, "image_error", "the picture is empty (0 bytes)"),
        ({"image": base64.b64encode(PICTURE[:2000]).decode()}, "image_error", "the picture is damaged"),
        ({"question": None}, "invalid_request", "give a question, or a prompt, and not both"),
        ({"prompt": "a"}, "invalid_request", "give a question, or a prompt, and not both"),
        ({"question": ["a"]}, "invalid_request", "question: Input should be a valid string"),
        ({"question": " "}, "prompt_error", "the question is empty"),
        ({"question": "<image>"}, "prompt_error", "the text contains <image>"),
        ({"question": "a" * 3_000_000}, "prompt_error", "a text has 3,000,000 characters"),
        ({"question": "what " * 500}, "prompt_error", "the text has 504 tokens"),
        ({"choices": ["a", "b" * 9000]}, "prompt_error", "a text has 9,000 characters"),
        ({"choices": ["a"] * 2001}, "invalid_request", "the JSON has more than 2,000 items"),
        ({"choices": []}, "input_error", "choices is empty"),
        ({"choices": ["a"] * 257}, "invalid_request", "choices: List should have at most 256 items"),
        ({"choices": "blue"}, "invalid_request", "choices: Input should be a valid array"),
        ({"max_new_tokens": 0}, "input_error", "max_new_tokens is 0"),
        ({"max_new_tokens": "1"}, "invalid_request", "max_new_tokens: Input should be a valid integer"),
        ({"max_new_tokens": 10**30}, "input_error", "max_new_tokens is 1000"),
        ({"temperature": True}, "invalid_request", "temperature: Input should be a valid number"),
        ({"seed": -1}, "input_error", "seed is -1"),
        ({"Question": "a"}, "invalid_request", "Question: Extra inputs are not permitted"),
    ],
)
def test_bad_values(server: Running, changes: dict[str, Any], code: str, message: str) -> None:
    reply = server.ask(**changes)
    assert (reply.status, reply.code) == (400, code)
    error = reply.json["error"]
    assert error["message"].startswith(message)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    assert error["message"].isprintable()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}",
        b'{"image": "", "question": "\\ud800"}',
        b'{"image": "", "question": "\xff"}',
        b'{"image": "", "question": "a", "seed": ' + b"9" * 100_000 + b"}",
        b'{"image": "", "question": "a", "temperature": NaN}',
        b'{"image": "", "question": "a", "temperature": 1e999}',
        b'{"image": "", "question": "a", "\\u0000\\n": 1}',
        b'\xef\xbb\xbf{"image": ""}',
    ],
)
def test_bad_json(server: Running, body: bytes) -> None:
    reply = server.request("POST", "/v1/answer", body, {"Content-Type": "application/json; charset=utf-8"})
    assert (reply.status, reply.code) == (400, "invalid_request")
    assert reply.json["error"]["message"].isprintable()


def test_other_types_methods_and_paths(server: Running) -> None:
    reply = server.request("POST", "/v1/answer", b"a=1", {"Content-Type": "application/x-www-form-urlencoded"})
    assert (reply.status, reply.code) == (415, "unsupported_media_type")
    reply = server.request("GET", "/v1/answer")
    assert (reply.status, reply.code, reply.headers["allow"]) == (405, "method_not_allowed", "POST")
    for path in ("/v1/answers", "/v1/answer/", "/..%2f", "/%00", "/v1//answer"):
        reply = server.request("POST", path, ASK)
        assert (reply.status, reply.code) == (404, "not_found")
