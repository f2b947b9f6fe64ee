"""Tokens of an answer as OpenAI's clients want them: their texts add up to the text that was sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pgfast.token_texts import TokenText, TokenTexts

from .chat_answer_schema import TokenLogprob


class TokenLog:
    """Takes tokens as the model makes them and gives them out with the text that they belong to.

    Args:
        texts: From `Engine.token_texts`.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._waiting: deque[tuple[TokenText, float]] = deque()

    def add(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Take all tokens so far; those of earlier calls are among them."""
        for token in self._texts.add(ids[self._texts.count :]):
            self._waiting.append((token, logprobs[token.index]))

    def take(self, start: int, end: int, *, last: bool = False) -> list[TokenLogprob]:
        """Return the tokens between two places of the text that were not returned yet, cut to it.

        Args:
            start: Characters before the answer (blanks).
            end: Characters before the end of what is sent; a token that reaches beyond it is kept for the next call.
            last: There is no next call.
        """
        taken = []
        while self._waiting and (last or self._waiting[0][0].end <= end):
            token, logprob = self._waiting.popleft()
            text = token.text[max(0, start - token.start) : max(0, end - token.start)]
            if text == token.text and start <= token.start < end:
                taken.append(TokenLogprob(token=text, bytes=list(token.bytes), logprob=logprob))
            elif text:
                taken.append(TokenLogprob(token=text, bytes=list(text.encode()), logprob=logprob))
        return taken


def tokens_of(texts: TokenTexts, ids: Sequence[int], logprobs: Sequence[float], text: str) -> list[TokenLogprob]:
    """Return the tokens of a whole answer.

    Args:
        texts: From `Engine.token_texts`.
        ids: Generated ids.
        logprobs: One for each.
        text: The answer: text of the ids without blanks around it and without what follows a stop text.
    """
    log = TokenLog(texts)
    log.add(ids, logprobs)
    whole = texts.text
    start = whole.find(text)
    # a choice is returned as it was given, which may differ from its tokens: those are shown as they are
    return log.take(start, start + len(text), last=True) if start >= 0 else log.take(0, len(whole), last=True)
