"""Text to token ids and back: prompt templates, the reserved markers, the prompt's fixed layout.

A prompt is `<bos>`, the tokens of the text, and the newline tokenized on its own
(big_vision, configs/proj/paligemma/transfers/common.py); the image tokens in front of it never appear as ids.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pgfast.errors import BundleError, PromptError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Tokenizer

logger = logging.getLogger(__name__)

SEPARATOR = "\n"
"""Ends the prompt; the answer follows it."""

_RESERVED = re.compile(r"<(?:image|pad|eos|bos|unk|loc\d{4}|seg\d{3})>")


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
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise BundleError(f"{path.name} is not a tokenizer file: {_one_line(error)}") from error
        self._start(tokenizer, bos_id)

    @classmethod
    def wrap(cls, tokenizer: _Tokenizer, *, bos_id: int) -> Tokenizer:
        """Wrap a tokenizer that is already in memory (used where the demo model is trained)."""
        self = cls.__new__(cls)
        self._start(tokenizer, bos_id)
        return self

    def _start(self, tokenizer: _Tokenizer, bos_id: int) -> None:
        # the second line of defence behind the refusal in `encode_prompt`: text never matches a special token
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._bos_id = bos_id
        self._separator_ids = self._ids(SEPARATOR)
        added = tokenizer.get_added_tokens_decoder()
        self._unknown_id = tokenizer.token_to_id("<unk>")
        self._reserved_ids = {id for id, token in added.items() if _RESERVED.fullmatch(token.content)} - {self._unknown_id}

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str, *, max_tokens: int) -> list[int]:
        """Return `<bos>`, the text's tokens and the newline.

        Args:
            text: The whole prompt, for example `answer en what is this?`.
            max_tokens: The most ids the bundle accepts, `<bos>` and newline included.

        Raises:
            PromptError: The text is empty, too long, not valid Unicode, or holds a reserved marker such as `<image>`.
        """
        if not text.strip():
            raise PromptError("the text is empty: ask a question")
        if marker := _RESERVED.search(text):
            raise PromptError(f"the text contains {marker.group()}, a marker of the model itself: remove it")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("the text is not valid Unicode (a lone surrogate)") from error
        # far more characters than tokens can hold: refuse before the tokenizer spends time on it
        if len(text) > 1000 * max_tokens:
            raise PromptError(f"the text has {len(text)} characters: this model takes at most {max_tokens} tokens")
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = [self._bos_id, *encoding.ids, *self._separator_ids]
        if self._reserved_ids.intersection(ids[1:]):
            raise PromptError("the text turns into a marker of the model itself: rephrase it")
        if len(ids) > max_tokens:
            raise PromptError(f"the text has {len(ids)} tokens: this model takes at most {max_tokens}")
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        if unknown := {text[start:end] for id, (start, end) in spans if id == self._unknown_id}:
            logger.warning("the model has no words for: %s", ", ".join(sorted(unknown)))
        return ids

    def encode_suffix(self, text: str) -> list[int]:
        """Return the ids of an answer, without `<eos>`."""
        return self._ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids; `<loc>` and `<seg>` markers stay, `<eos>` and the like do not."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def fill_template(template: str, *, text: str, language: str) -> str:
    """Fill a prompt template of the manifest, for example `answer {language} {text}`.

    Plain replacement rather than `str.format`: braces in the user's text stay what they are.
    """
    parts = re.split(r"(\{text\}|\{language\})", template)
    return "".join({"{text}": text, "{language}": language}.get(part, part) for part in parts)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
