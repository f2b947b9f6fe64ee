"""Text to token ids and back: prompt templates, the reserved markers, the prompt's fixed layout.

A prompt is `<bos>`, the tokens of the text, and the newline tokenized on its own
(big_vision, configs/proj/paligemma/transfers/common.py); the image tokens in front of it never appear as ids.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pgfast.errors import BundleError, InputError, PromptError
from pgfast.validation import check_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Tokenizer

logger = logging.getLogger(__name__)

SEPARATOR = "\n"
"""Ends the prompt; the answer follows it."""

_RESERVED = re.compile(r"<(?:image|pad|eos|bos|unk|loc\d{4}|seg\d{3})>")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_LOCATION = re.compile(r"<(?:loc\d{4}|seg\d{3})>")


class Tokenizer:
    """The bundle's tokenizer, with text from users kept apart from the model's own markers.

    Args:
        path: `tokenizer.json` of the bundle.
        bos_id: Id that starts every prompt.

    Raises:
        BundleError: The file is not a tokenizer.
    """

    def __init__(self, path: Path, *, bos_id: int) -> None:
        import tokenizers

        try:
            self._start(tokenizers.Tokenizer.from_file(str(path)), bos_id)
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise BundleError(f"{path.name} is not a usable tokenizer file: {_one_line(error)}") from error

    @classmethod
    def open(cls, path: Path, bos_id: int, vocab_size: int) -> Tokenizer:
        """Open the tokenizer of a model with so many tokens (raises as the constructor and `check_ids`)."""
        self = cls(path, bos_id=bos_id)
        self.check_ids(vocab_size)
        return self

    @classmethod
    def wrap(cls, tokenizer: _Tokenizer, *, bos_id: int) -> Tokenizer:
        """Wrap a tokenizer that is already in memory (used where the demo model is trained)."""
        self = cls.__new__(cls)
        self._start(tokenizer, bos_id)
        return self

    def _start(self, tokenizer: _Tokenizer, bos_id: int) -> None:
        # transformers saves these two with the file whenever they were last used
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # the second line of defence behind the refusal in `encode_prompt`: text never matches a special token
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._bos_id = bos_id
        self._vocab_size = 2**31
        self._separator_ids = self._ids(SEPARATOR)
        added = tokenizer.get_added_tokens_decoder()
        self._unknown_id = tokenizer.token_to_id("<unk>")
        self._reserved_ids = {id for id, token in added.items() if _RESERVED.fullmatch(token.content)} - {self._unknown_id}
        self._special_ids = {id for id, token in added.items() if token.special}
        found = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        byte_ids = [id for id in found if id is not None]
        # of byte fallback, which has all of them
        self._bytes = {id: byte for byte, id in enumerate(byte_ids)} if len(byte_ids) == len(found) else {}
        self._location_ids = {id for id, token in added.items() if _LOCATION.fullmatch(token.content)}

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def check_ids(self, vocab_size: int) -> None:
        """Make sure that no id leads out of the embedding.

        Raises:
            BundleError: The tokenizer belongs to another model.
        """
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if size > vocab_size:
            raise BundleError(f"tokenizer.json has {size} tokens, the model {vocab_size}: they do not belong together")
        self._vocab_size = vocab_size

    def encode_prompt(self, text: str, *, max_tokens: int) -> list[int]:
        """Return `<bos>`, the text's tokens and the newline.

        Args:
            text: The whole prompt, for example `answer en what is this?`.
            max_tokens: The most ids the bundle accepts, `<bos>` and newline included.

        Raises:
            PromptError: The text is empty, too long, not valid Unicode, or holds a reserved marker such as `<image>`.
        """
        ids = [self._bos_id, *self._encode_plain(text, max_tokens), *self._separator_ids]
        if len(ids) > max_tokens:
            raise PromptError(f"the text has {len(ids)} tokens: this model takes at most {max_tokens}")
        return ids

    def _encode_plain(self, text: str, max_tokens: int, *, locations: bool = False) -> list[int]:
        """Encode text that may not hold or become a marker; with `locations` those of boxes and masks are allowed."""
        if not isinstance(text, str):
            raise PromptError(f"a text is needed, not {type(text).__name__}")
        if not text.strip():
            raise PromptError("the text is empty: ask a question")
        if marker := _RESERVED.search(_LOCATION.sub("", text) if locations else text):
            raise PromptError(f"the text contains {marker.group()}, a marker of the model itself: remove it")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("the text is not valid Unicode (a lone surrogate)") from error
        # far more characters than tokens can hold: refuse before the tokenizer spends time on it
        if len(text) > 1000 * max_tokens:
            raise PromptError(f"the text has {len(text)} characters: this model takes at most {max_tokens} tokens")
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:
            raise BundleError(f"tokenizer.json is not a usable tokenizer file: {_one_line(error)}") from error
        if (self._reserved_ids - self._location_ids if locations else self._reserved_ids).intersection(encoding.ids):
            raise PromptError("the text turns into a marker of the model itself: rephrase it")
        if max(encoding.ids, default=0) >= self._vocab_size:
            raise BundleError("tokenizer.json has ids outside the model's vocabulary: they do not belong together")
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        if unknown := {text[start:end] for id, (start, end) in spans if id == self._unknown_id}:
            logger.warning("the model has no words for: %s", ", ".join(sorted(unknown)))
        return list(encoding.ids)

    def encode_suffix(self, text: str, *, max_tokens: int = 1000, locations: bool = False) -> list[int]:
        """Return the ids of an answer, without `<eos>`; `locations` lets `<loc>` and `<seg>` in (raises as `encode_prompt`)."""
        return self._encode_plain(text, max_tokens, locations=locations)

    def encode_choices(self, choices: Sequence[str], *, eos_id: int, max_tokens: int) -> list[list[int]]:
        """Return the ids of each choice, `<eos>` included.

        Args:
            choices: Answers to choose from.
            eos_id: The end token.
            max_tokens: The longest a choice may be, `<eos>` included.

        Raises:
            InputError: There is none, one is too long or cannot be used, or two are the same to the model.
        """
        if not check_texts("choices", choices):
            raise InputError("choices is empty: give at least one answer")
        seen = dict[tuple[int, ...], str]()
        for choice in choices:
            # as an answer, which has no blanks around it
            ids = (*self.encode_suffix(choice.strip(), max_tokens=max_tokens), eos_id)
            if len(ids) > max_tokens:
                raise InputError(f"the choice {choice[:40]!r} has {len(ids)} tokens: this bundle makes at most {max_tokens}")
            if ids in seen:
                raise InputError(f"the model cannot tell the choices {seen[ids]!r} and {choice!r} apart")
            seen[ids] = choice
        return [list(ids) for ids in seen]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids; `<loc>` and `<seg>` markers stay, `<eos>` and the like do not.

        Further ids only add to it. So bytes at the end that may still become a character are left out, and with byte
        fallback those that cannot are U+FFFD and leave the characters before them as they are (the tokenizers library
        replaces all bytes in a row when one does not fit).
        """
        if self._bytes:
            ids = self._mend_bytes(ids) if not self._bytes.keys().isdisjoint(ids) else ids
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        for dropped in range(4):  # a decoder that joins bytes by itself
            text = str(self._tokenizer.decode(list(ids[: len(ids) - dropped]), skip_special_tokens=True))
            if not text.endswith("\ufffd") or dropped >= len(ids):
                return text
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _mend_bytes(self, ids: Sequence[int]) -> list[int]:
        """Return ids whose bytes are UTF-8: what is not becomes the bytes of U+FFFD, half a character at the end nothing."""
        seen = [id for id in ids if id not in self._special_ids and self._tokenizer.id_to_token(id) is not None]
        groups = [(are_bytes, list(group)) for are_bytes, group in groupby(seen, self._bytes.__contains__)]
        token_of = {byte: id for id, byte in self._bytes.items()}
        mended = list[int]()
        for number, (are_bytes, group) in enumerate(groups, 1):
            if are_bytes:
                data = bytes(self._bytes[id] for id in group)
                text, _ = codecs.utf_8_decode(data, "replace", number < len(groups))  # type: ignore[attr-defined, unused-ignore]
                group = [token_of[byte] for byte in text.encode()]
            mended += group
        return mended

    def byte(self, id: int) -> bytes | None:
        """Return the byte that a token of byte fallback (`<0xE2>`) stands for; None: it is another token."""
        found = _BYTE.fullmatch(self._tokenizer.id_to_token(id) or "")
        return bytes.fromhex(found[1]) if found else None

    def location(self, id: int) -> str | None:
        """Return the token of a box or a mask, such as `<loc0512>`; None: it is another token."""
        return str(self._tokenizer.id_to_token(id)) if id in self._location_ids else None

    def decode_with_markers(self, ids: Sequence[int]) -> str:
        """Return the text of ids with `<bos>`, `<eos>` and all other markers, to look at."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def fill_template(template: str, *, text: str, language: str) -> str:
    """Fill a prompt template of the manifest, for example `answer {language} {text}`.

    Plain replacement rather than `str.format`: braces in the user's text stay what they are.
    """
    parts = re.split(r"(\{text\}|\{language\})", template)
    return "".join({"{text}": text, "{language}": language}.get(part, part) for part in parts)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Cut the text before the first stop text."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def safe_length(text: str, stops: Sequence[str]) -> int:
    """How much of an unfinished text can be given out: what could still become a stop text is held back."""
    length = len(text)
    for stop in stops:
        for size in range(min(len(stop) - 1, length), 0, -1):
            if text[:length].endswith(stop[:size]):
                length -= size
                break
    return length


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
