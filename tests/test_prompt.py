"""Prompts, templates and the reserved markers."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import WORDS
from hypothesis import given
from hypothesis import strategies as st
from pgfast.train.demo.tiny_paligemma import LOCATION_TOKENS, SEGMENT_TOKENS, SPECIAL_TOKENS, build_tokenizer

from pgfast.errors import BundleError, PromptError
from pgfast.prompt import Tokenizer, fill_template

MARKERS = ["<image>", "<pad>", "<eos>", "<bos>", "<unk>", "<loc0000>", "<loc0001>", "<loc1023>", "<seg000>", "<seg127>"]
RAW = build_tokenizer(WORDS)
RESERVED = {RAW.token_to_id(t) for t in (*SPECIAL_TOKENS, "<image>", *LOCATION_TOKENS, *SEGMENT_TOKENS)} - {
    RAW.token_to_id("<unk>")
}
TOKENIZER = Tokenizer.wrap(RAW, bos_id=2)


def test_layout_is_bos_text_newline() -> None:
    ids = TOKENIZER.encode_prompt("answer en What color is the circle?", max_tokens=20)
    assert [RAW.id_to_token(id) for id in ids] == [
        "<bos>", "answer", "en", "what", "color", "is", "the", "circle", "?", "\n",
    ]  # fmt: skip


@pytest.mark.parametrize("marker", MARKERS)
def test_markers_are_refused(marker: str) -> None:
    with pytest.raises(PromptError, match=marker):
        TOKENIZER.encode_prompt(f"what is {marker} here", max_tokens=50)


LOOKALIKES = ["<", ">", "loc0001", "image", "what", " ", "\n", "\uff1ceos\uff1e", "<EOS>", "<Loc0001>"]


@given(st.lists(st.sampled_from(MARKERS + LOOKALIKES)))
def test_no_text_becomes_a_marker(parts: list[str]) -> None:
    try:
        ids = TOKENIZER.encode_prompt("".join(parts), max_tokens=500)
    except PromptError:
        return
    assert ids[0] == 2
    assert not RESERVED.intersection(ids[1:])


@given(st.text(max_size=80))
def test_any_text_gives_a_prompt_or_a_prompt_error(text: str) -> None:
    try:
        ids = TOKENIZER.encode_prompt(text, max_tokens=30)
    except PromptError:
        return
    assert 2 < len(ids) <= 30
    assert not RESERVED.intersection(ids[1:])


@pytest.mark.parametrize(
    ("text", "message"), [("", "empty"), (" \n\t", "empty"), ("what " * 40, "at most 30"), ("x" * 10**6, "at most 30")]
)
def test_empty_and_long_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        TOKENIZER.encode_prompt(text, max_tokens=30)


def test_words_the_model_does_not_have_are_said(caplog: pytest.LogCaptureFixture) -> None:
    TOKENIZER.encode_prompt("what color is the Zebra", max_tokens=30)
    assert caplog.messages == ["the model has no words for: Zebra"]
    caplog.clear()
    TOKENIZER.encode_prompt("what color is the circle", max_tokens=30)
    assert caplog.messages == []


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(PromptError, match="Unicode"):
        TOKENIZER.encode_prompt("what \ud800", max_tokens=30)


def test_templates_leave_braces_in_the_question_alone() -> None:
    assert fill_template("answer {language} {text}", text="{language} {0}", language="en") == "answer en {language} {0}"


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a usable tokenizer"):
        Tokenizer(path, bos_id=2)
