"""Which token brought which part of an answer, against the tokenizers library's own decoding."""

from __future__ import annotations

import tokenizers
from conftest import WORDS
from hypothesis import given
from hypothesis import strategies as st
from pgfast.train.demo.tiny_paligemma import build_tokenizer
from tokenizers import decoders, models

import pgfast
from pgfast.loading import demo_bundle
from pgfast.prompt import Tokenizer
from pgfast.token_texts import TokenText, TokenTexts

PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", "blue", "\u2581circle", "a", "\n", "\u00e4"]


def gemma_like() -> tokenizers.Tokenizer:
    """Gemma's kind of tokenizer: spaces as U+2581, and a token for each byte of what is not in the vocabulary."""
    vocab = {piece: id for id, piece in enumerate([*PIECES, *(f"<0x{byte:02X}>" for byte in range(256))])}
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens(PIECES[:4])
    return raw


RAW = gemma_like()
GEMMA = Tokenizer.wrap(RAW, bos_id=2)
WORDLEVEL = Tokenizer.wrap(build_tokenizer(WORDS), bos_id=2)


def ids_of(*tokens: str) -> list[int]:
    return [RAW.token_to_id(token) for token in tokens]


def byte_ids(data: bytes) -> list[int]:
    return ids_of(*(f"<0x{byte:02X}>" for byte in data))


def test_a_character_of_several_bytes_is_completed_by_its_last_one() -> None:
    party = "\U0001f389".encode()
    ids = [*ids_of("blue"), *byte_ids(party), *ids_of("\u2581circle", "<eos>")]
    tokens = TokenTexts(GEMMA).add(ids)
    assert [(token.text, token.bytes) for token in tokens] == [
        ("blue", b"blue"),
        ("", party[0:1]),
        ("", party[1:2]),
        ("", party[2:3]),
        ("\U0001f389", party[3:4]),
        (" circle", b" circle"),
    ]
    assert [token.index for token in tokens] == [0, 1, 2, 3, 4, 5]
    assert [token.end for token in tokens] == [4, 4, 4, 4, 5, 12]


def test_nothing_is_said_about_half_a_character() -> None:
    texts = TokenTexts(GEMMA)
    assert texts.add(byte_ids("\u00fc".encode()[:1])) == []
    assert texts.add(byte_ids("\u00fc".encode()[1:])) == [TokenText(0, 0, "", b"\xc3"), TokenText(1, 0, "\u00fc", b"\xbc")]
    assert texts.count == 2


@given(st.lists(st.integers(0, len(PIECES) + 255) | st.sampled_from(byte_ids("\U0001f389\u00fc".encode())), max_size=24))
def test_texts_and_bytes_add_up_whatever_the_model_says(ids: list[int]) -> None:
    whole = GEMMA.decode(ids)
    tokens = TokenTexts(GEMMA).add(ids)
    assert "".join(token.text for token in tokens) == whole
    assert b"".join(token.bytes for token in tokens) == whole.encode()


@given(st.text(alphabet="a\u00e4\u00fc\u732b\U0001f389\n", max_size=12))
def test_any_text_comes_back_token_by_token(text: str) -> None:
    ids = RAW.encode(text, add_special_tokens=False).ids
    texts = TokenTexts(GEMMA)
    tokens = [token for id in ids for token in texts.add([id])]
    assert [token.index for token in tokens] == list(range(len(ids)))
    assert "".join(token.text for token in tokens) == text
    assert b"".join(token.bytes for token in tokens) == text.encode()


def test_a_space_belongs_to_the_word_after_it() -> None:
    ids = [build_tokenizer(WORDS).token_to_id(word) for word in ("blue", "circle", "<eos>")]
    assert [token.text for token in TokenTexts(WORDLEVEL).add(ids)] == ["blue", " circle"]


def test_a_pending_question_tells_its_tokens() -> None:
    with pgfast.load(provider="cpu") as engine:
        picture = demo_bundle().parent / "blue_circle.png"
        pending = engine.submit(picture, "what color is the shape?")
        answer = pending.result()
        assert pending.tokens() == (list(answer.token_ids), list(answer.token_logprobs))
        assert [token.text for token in pending.token_texts().add(answer.token_ids)] == [answer.text] == ["blue"]
        text = ["<bos>", "answer", "en", "what", "color", "is", "the", "shape", "?", "\n"]  # its tokens are words
        assert pending.prompt_tokens == engine.manifest.dimensions.num_image_tokens + len(text)
        chosen = engine.submit(picture, "what color is the shape?", choices=["red", "blue"])
        best = chosen.result()
        assert chosen.tokens() == (list(best.token_ids), list(best.token_logprobs))
