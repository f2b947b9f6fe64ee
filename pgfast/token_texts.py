"""Which token of an answer brought which part of its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pgfast.prompt import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token that shows in the text."""

    index: int
    """Its place among the generated ids."""
    start: int
    """Characters of the text before it."""
    text: str
    """The characters that it completes; empty for the first bytes of a character."""
    bytes: bytes
    """Its own part of the text in UTF-8."""

    @property
    def end(self) -> int:
        """Characters of the text up to its end."""
        return self.start + len(self.text)


class TokenTexts:
    """Takes generated ids as they come and says what each adds to the text.

    Texts and bytes each add up to `Tokenizer.decode` of all ids. Tokens without a text, such as `<eos>`, are left out.

    Args:
        tokenizer: The bundle's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.text = ""
        """Of the ids so far."""
        self._open: list[int] = []

    @property
    def count(self) -> int:
        """How many ids it has taken."""
        return len(self._ids)

    def add(self, ids: Iterable[int]) -> list[TokenText]:
        """Take the next ids and return the tokens whose texts are known now, in order."""
        return [token for id in ids for token in self._add(id)]

    def _add(self, id: int) -> list[TokenText]:
        self._open.append(len(self._ids))
        self._ids.append(id)
        # all of them: a token's text depends on those before it (spaces, bytes of one character)
        text = self._tokenizer.decode(self._ids)
        start, settled = len(self.text), self._open
        if len(text) <= start or not text.startswith(self.text):
            return []
        new, self.text, self._open = text[start:], text, []
        own = [self._tokenizer.byte(self._ids[index]) for index in settled]
        if None in own or b"".join(byte or b"" for byte in own) != new.encode():
            return [TokenText(settled[-1], start, new, new.encode())]
        *first, last = zip(settled, own, strict=True)
        halves = [TokenText(index, start, "", byte or b"") for index, byte in first]
        return [*halves, TokenText(last[0], start, new, last[1] or b"")]
