"""Streams token by token: pieces add up to the answer, characters are never split, stop texts never get out."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st
from test_token_texts import GEMMA, PIECES, RAW, byte_ids, ids_of

from pgfast import GenerateOptions
from pgfast.pending import Pending
from pgfast.runtime.generation import Ending, Generation

EOS = 1
UNKNOWN = len(PIECES) + 256 + 5
"""The model has rows that the tokenizer has no token for."""
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


class Spoken:
    """A ticket of a model that says given ids; its reader sees the row after every one of them."""

    def __init__(self, row: Generation, ids: list[int]) -> None:
        self.row, self.ids, self.finished = row, ids, False
        self.begun = self.first_token = self.ended = 0.0

    def progress(self) -> Iterator[bool]:
        for id in self.ids:
            self.finished = self.row.advance(id, -1.0, None) is None  # type: ignore[arg-type]
            yield self.finished
            if self.finished:
                return

    def wait(self, timeout: float | None) -> None:
        assert self.finished


def stream(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Any]:
    """Pieces and the answer."""
    options = GenerateOptions(max_new_tokens=len(ids), stop=stop)
    stopped = (lambda ids: any(text in GEMMA.decode(ids) for text in stop)) if stop else None
    row = Generation(options, Ending(len(ids), EOS, stopped))
    pending = Pending(row, Spoken(row, ids), GEMMA, options, None, 0.0, 0.0, 0.0, None)  # type: ignore[arg-type]
    pieces = list(pending.pieces())
    return pieces, pending.result()


def text_of(ids: list[int]) -> str:
    """What Python makes of the bytes that the ids stand for."""
    data = b""
    for id in ids:
        if len(PIECES) <= id < len(PIECES) + 256:
            data += bytes([id - len(PIECES)])
        elif 4 <= id < len(PIECES):
            data += PIECES[id].replace("\u2581", " ").encode()
    return codecs.utf_8_decode(data, "replace", False)[0]  # type: ignore[attr-defined, no-any-return, unused-ignore]


def expected(ids: list[int], stop: tuple[str, ...]) -> str:
    for count in range(1, len(ids) + 1):
        text = text_of(ids[:count])
        if any(each in text for each in stop):
            return text[: min(text.find(each) for each in stop if each in text)].strip()
        if ids[count - 1] == EOS:
            break
    return text_of(ids[:count]).strip()


one_id = st.one_of(
    st.integers(4, len(PIECES) - 1),
    st.sampled_from([EOS, 2, 3, UNKNOWN]),  # <eos>, <bos>, <unk>
    st.integers(len(PIECES), len(PIECES) + 255),
)
character = st.sampled_from(["\u00fc", "\u20ac", "\U0001f389", FAMILY, "\u00e4", "a"]).map(lambda text: byte_ids(text.encode()))
spoken = st.lists(st.one_of(one_id.map(lambda id: [id]), character), min_size=1, max_size=14).map(
    lambda parts: list(itertools.chain(*parts))
)
stops = st.lists(
    st.sampled_from(["blue", "lueb", "ue ci", "a", "aa", "\u00fc", "\u200d", "\ufffd", " ", "\n", "ea\u00e4", "\U0001f389a"]),
    max_size=3,
).map(tuple)


@given(spoken, stops)
@example(byte_ids("\u00fc".encode() + b"\xff"), ())  # the library takes the first character back
@example(byte_ids(b"\xe2\x82"), ())
@example([*byte_ids(b"\xc3"), UNKNOWN, *byte_ids(b"\xbc")], ())
@example([*byte_ids(b"\xc3"), 3, *byte_ids(b"\xbc")], ())
def test_pieces_add_up_to_the_answer_whatever_the_model_says(ids: list[int], stop: tuple[str, ...]) -> None:
    pieces, answer = stream(ids, stop)
    assert "".join(pieces) == answer.text == expected(ids, stop)
    assert not any(text.strip() and text in answer.text for text in stop)
    assert all(pieces)
    event(f"{len(pieces) > 1}, {answer.finish_reason}")


@pytest.mark.parametrize("text", ["\U0001f389", FAMILY, "\u00fc\u20ac", "a\u0308"])
def test_every_code_point_comes_with_its_last_byte(text: str) -> None:
    pieces, answer = stream([*byte_ids(text.encode()), EOS])
    assert pieces == list(text)
    assert answer.text == text


def test_bytes_that_fit_nothing_leave_the_others_alone() -> None:
    ids = [*byte_ids("\U0001f389".encode() + b"\xff" + "\u00fc".encode() + b"\xe2\x82"), EOS]
    pieces, answer = stream(ids)
    assert pieces == ["\U0001f389", "\ufffd", "\u00fc"]
    assert answer.text == "\U0001f389\ufffd\u00fc"  # half a character at the end is left out


@given(st.text(alphabet="a\u00e4\u00fc\u732b\U0001f389\n\u200d", max_size=12))
def test_valid_texts_are_those_of_the_library(text: str) -> None:
    ids = RAW.encode(text, add_special_tokens=False).ids
    assert GEMMA.decode(ids) == RAW.decode(ids) == text


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [
        (("blue",), []),  # the first token
        (("lu",), ["b"]),  # within it
        (("e ci",), ["blu"]),  # across two
        (("cir", "e c"), ["blu"]),  # overlapping: the first place counts
        (("e c", "e circle"), ["blu"]),
        (("zebra",), ["blue", " circle", "a"]),
        (("circle\u00e4",), ["blue", " circlea"]),  # held back as long as it may become one
        (("circleab",), ["blue", " circlea"]),  # to the end
    ],
)
def test_stop_texts(stop: tuple[str, ...], pieces: list[str]) -> None:
    found, answer = stream(ids_of("blue", "\u2581circle", "a", "<eos>"), stop)
    assert found == pieces
    assert answer.text == "".join(pieces)
    assert answer.finish_reason == "stop"
