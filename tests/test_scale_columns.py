"""Rows and results come through their columns as they were."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from pgfast.batch.rows import Failure, Result, Row
from pgfast.scale.columns import pack, unpack_result, unpack_row
from pgfast.types import Answer, Timings

# paths of the system may hold halves of characters
TEXTS = st.text(st.characters(codec="utf-8") | st.characters(categories=["Cs"]), max_size=20)
NUMBERS = st.floats(allow_nan=False)
FAILURES = st.builds(Failure, TEXTS, TEXTS)
ROWS = st.builds(
    Row,
    number=st.integers(0),
    id=st.none() | TEXTS | st.integers(),
    image=st.none() | TEXTS,
    picture=TEXTS,
    embedded=st.booleans(),
    question=st.none() | TEXTS,
    prompt=st.none() | TEXTS,
    choices=st.none() | st.lists(TEXTS, max_size=3).map(tuple),
    language=TEXTS,
    error=st.none() | FAILURES,
)
ANSWERS = st.builds(
    Answer,
    text=TEXTS,
    confidence=NUMBERS,
    token_ids=st.lists(st.integers(0), max_size=3).map(tuple),
    token_logprobs=st.lists(NUMBERS, max_size=3).map(tuple),
    finish_reason=st.sampled_from(["stop", "length"]),
    choices=st.none() | st.dictionaries(TEXTS, NUMBERS, max_size=3),
    timings=st.builds(Timings, *[NUMBERS] * 6),
    calibrated=st.none() | NUMBERS,
    unsure_of=st.none() | TEXTS,
)


@given(ROWS)
def test_a_row_comes_through(row: Row) -> None:
    assert unpack_row(pack(row)) == row
    json.loads(pack(row).decode("ascii"))


@given(st.builds(Result, ROWS, st.none() | ANSWERS, st.none() | FAILURES))
def test_a_result_comes_through(result: Result) -> None:
    found = unpack_result(pack(result))
    assert found == result
    assert found.answer is None or type(found.answer.token_ids) is tuple
