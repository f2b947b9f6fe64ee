"""Damage inside JSON: depth, numbers, types, text, base64."""

from __future__ import annotations

import base64
import json
from random import Random
from typing import Any

from ..questions import PATH, picture
from .shot import CHAT, Kind, Shot, post

DEPTH = 100_000
FIELDS = (
    "image",
    "question",
    "prompt",
    "choices",
    "language",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "min_confidence",
)
CHAT_FIELDS = (
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "n",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "seed",
    "response_format",
    "tools",
    "user",
)
NUMBERS = (
    b"1e999",
    b"-1e999",
    b"1" * 5000,
    b"-" + b"9" * 400,
    b"1e-400",
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"0x10",
    b"01",
    b"1.",
    b".5",
    b"1e",
    b"18446744073709551616",
    b"-9223372036854775809",
    b"2147483648",
    b"1.7976931348623159e308",
    b"0." + b"0" * 5000 + b"1",
    b"-0",
    b"1e5",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    2**63,
    "",
    " ",
    "a",
    "\x00",
    "\u202e",
    "é" * 3000,
    "x" * 200_000,
    [],
    {},
    [None],
    [[]],
    ["a", 1],
    ["a"] * 20_000,
    ["a", "a"],
    [""],
    {"url": 5},
    {"url": "http://169.254.169.254/latest/meta-data/"},
    {"url": "file:///etc/passwd"},
    {"url": "http://[::1]:22/"},
    {"url": "data:image/png;base64,"},
    {"type": "image_url"},
    {"": {"": {}}},
)
WORDS = (
    rb'"\ud800"',
    rb'"\udfff\ud800"',
    rb'"\u0000"',
    b'"\xff\xfe"',
    b'"\xc0\xaf"',
    b'"\xed\xa0\x80"',
    rb'"\x41"',
    b'"\x01"',
    b'"a',
)
ENCODED = (
    "!!!!",
    "====",
    "A",
    "AAAA=AAA",
    "data:image/png;base64",
    "data:,hello",
    "data:image/png,notbase64",
    "data:text/html;base64,PGI+",
    "DATA:IMAGE/PNG;BASE64,AAAA",
    "data:image/png;charset=\u0000;base64,AAAA",
    "data:" + ";" * 10_000 + "base64,AAAA",
    "http://127.0.0.1:1/x.png",
    "https://evil.example/x.png",
    "file:///etc/passwd",
    "/etc/passwd",
    "A" * 300_000,
    "\n" * 10_000,
    "\uff21" * 4,
)
MANY_KEYS = b"{" + b",".join(b'"k%d":%d' % (i, i) for i in range(20_000)) + b"}"


def _answer_object() -> dict[str, Any]:
    return {"image": base64.b64encode(picture(7, 4)).decode(), "question": "what color is the shape?"}


def _chat_object() -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(picture(7, 4)).decode()}"}}
    text = {"type": "text", "text": "what color is the shape?"}
    return {"model": "demo", "messages": [{"role": "user", "content": [image, text]}], "max_tokens": 4}


def _target(rng: Random) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Where it goes, a right body for there, and the names of its fields."""
    if rng.random() < 0.4:
        return CHAT, _chat_object(), CHAT_FIELDS
    return rng.choice((PATH, f"{PATH}?stream=1")), _answer_object(), FIELDS


def _with_raw(content: dict[str, Any], name: str, value: bytes) -> bytes:
    """The object with a field whose value is put in as it is."""
    rest = {key: kept for key, kept in content.items() if key != name}
    return json.dumps({**rest, name: "@raw@"}).encode().replace(b'"@raw@"', value)


def deep(rng: Random) -> Shot:
    """Arrays and objects inside each other, as the body or in a field."""
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")))
    depth = rng.choice((200, 1000, 10_000, DEPTH))
    nest = opening * depth + b"1" + (closing * depth if rng.random() < 0.7 else b"")
    path, content, fields = _target(rng)
    return Shot(post(nest if rng.random() < 0.4 else _with_raw(content, rng.choice(fields), nest), path=path))


def numbers(rng: Random) -> Shot:
    """Numbers that no type holds, and words that are no JSON."""
    path, content, fields = _target(rng)
    return Shot(post(_with_raw(content, rng.choice(fields), rng.choice(NUMBERS)), path=path))


def types(rng: Random) -> Shot:
    """A field with a value of another type, several fields at times."""
    path, content, fields = _target(rng)
    for _ in range(rng.choice((1, 1, 1, 3))):
        content[rng.choice(fields)] = rng.choice(VALUES)
    return Shot(post(json.dumps(content).encode(), path=path))


def inner_types(rng: Random) -> Shot:
    """A message of a chat with a value of another type inside."""
    content = _chat_object()
    message = content["messages"][0]
    places: list[tuple[Any, Any]] = [(message, "role"), (message, "content"), (message["content"], 0), (message["content"], 1)]
    places += [(part, key) for part in message["content"] for key in ("type", "text", "image_url")]
    places.append((message["content"][0]["image_url"], "url"))
    place, key = rng.choice(places)
    place[key] = rng.choice((*VALUES, *ENCODED))
    if rng.random() < 0.2:
        content["messages"] = content["messages"] * rng.randrange(2, 300)
    return Shot(post(json.dumps(content).encode(), path=CHAT))


def keys(rng: Random) -> Shot:
    """Keys twice, unknown ones, too many, none."""
    path, content, fields = _target(rng)
    text = json.dumps(content).encode()
    name = rng.choice(fields).encode()
    bodies = (
        b'{"%s": 1, ' % name + text[1:],
        text[:-1] + b', "%s": null}' % name,
        text[:-1] + b', "unknown": 1}',
        text[:-1] + b', "__proto__": {"a": 1}, "__class__": 1}',
        MANY_KEYS,
        b'{"' + b"k" * 100_000 + b'": 1}',
        b"{}",
        b"[]",
        b"null",
        b'"text"',
        b"1",
        b"",
        b" " * 1000,
        text + text,
        text[:-1],
        text.replace(b'"', b"'"),
        b"\xef\xbb\xbf" + text,
        text.decode().encode("utf-16"),
        text.decode().encode("utf-32"),
        text[: rng.randrange(len(text))],
    )
    return Shot(post(rng.choice(bodies), path=path))


def words(rng: Random) -> Shot:
    """Text that is no text: invalid UTF-8, halves of surrogates, control characters."""
    path, content, fields = _target(rng)
    word = rng.choice(WORDS)
    body = _with_raw(content, rng.choice(fields), rng.choice((word, b"[%s]" % word)))
    if path == CHAT and rng.random() < 0.6:
        body = json.dumps(content).encode().replace(b'"what color is the shape?"', word)
    return Shot(post(body, path=path))


def encodings(rng: Random) -> Shot:
    """Base64 that is none, and addresses instead of it."""
    path, content, _ = _target(rng)
    text = rng.choice(ENCODED)
    if rng.random() < 0.3:
        image = bytearray(base64.b64encode(picture(7, 4)))
        for _ in range(rng.randrange(1, 5)):
            image[rng.randrange(len(image))] = rng.randrange(32, 127)
        text = rng.choice(("", "data:image/png;base64,")) + image.decode()
    if path == CHAT:
        content["messages"][0]["content"][0]["image_url"]["url"] = text
    else:
        content["image"] = rng.choice((text, {"url": text}))
    return Shot(post(json.dumps(content).encode(), path=path))


def questions(rng: Random) -> Shot:
    """Prompts, choices and languages at and beyond their limits."""
    content = _answer_object()
    size = rng.choice((1, 50, 97, 500, 20_000, 200_000))
    changes: tuple[dict[str, Any], ...] = (
        {"question": "what " * size},
        {"question": "<image>" * size},
        {"question": "<bos><eos><pad>" * size},
        {"question": None, "prompt": "\n" * size},
        {"question": "a", "prompt": "b"},
        {"choices": ["a" * size, "b"]},
        {"choices": [f"c{i}" for i in range(size)]},
        {"language": "e" * size},
        {"language": "{text}"},
        {"stop": [chr(0x4E00 + i % 20_000) for i in range(size)]},
        {"max_new_tokens": size},
        {"temperature": 1e-300, "seed": 2**64},
        {"temperature": 1e300, "top_p": 1e-300},
        {"top_k": -size},
    )
    content.update(rng.choice(changes))
    return Shot(post(json.dumps(content).encode(), path=rng.choice((PATH, f"{PATH}?stream=1"))))


KINDS: dict[str, Kind] = {
    "deep JSON": deep,
    "numbers": numbers,
    "wrong types": types,
    "wrong types in messages": inner_types,
    "keys": keys,
    "broken text": words,
    "broken base64": encodings,
    "limits of questions": questions,
}
