"""An answer in OpenAI's form: whole, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from typing import Any

from pgfast.pending import Pending
from pgfast.types import Answer

from .chat_answer_schema import (
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    Logprobs,
    Message,
    PromptTokensDetails,
    TokenLogprob,
    Usage,
)
from .chat_logprobs import TokenLog, tokens_of
from .chat_schema import ChatRequest


class Reply:
    """Writes the answer to one request.

    Args:
        asked: The request.
        pending: Its question.
        model: Name of the model.
        fingerprint: Name of the bundle.
        image_tokens: How many tokens a picture is.
    """

    def __init__(self, asked: ChatRequest, pending: Pending, *, model: str, fingerprint: str, image_tokens: int) -> None:
        self._asked, self._pending, self._image_tokens = asked, pending, image_tokens
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._sent = ""
        self._log = TokenLog(pending.token_texts()) if asked.logprobs else None

    def whole(self, answer: Answer) -> bytes:
        """Return the response's body."""
        choice = Choice(
            message=Message(content=answer.text),
            logprobs=self._all_tokens(answer),
            finish_reason=answer.finish_reason,
            confidence=answer.confidence,
            calibrated=answer.calibrated,
            choices=answer.choices,
        )
        return ChatCompletion(**self._head, choices=[choice], usage=self._usage(answer)).model_dump_json().encode()

    def begin(self) -> bytes:
        """Return the stream's first event: who speaks."""
        return self._event([ChunkChoice(delta=Delta(role="assistant", content=""))])

    def news(self) -> bytes:
        """Return an event with the text that came since the last one; nothing if there is none."""
        raw = self._pending.text()
        # as in the whole answer there are no blanks around it; those in between are sent with the word after them
        return self._part(raw.strip(), len(raw) - len(raw.lstrip()), last=False)

    def end(self, answer: Answer) -> bytes:
        """Return the events after the last news: why the answer ended, and what was asked for besides."""
        raw = self._pending.text()
        if raw.strip():
            rest = self._part(answer.text, len(raw) - len(raw.lstrip()), last=True)
        else:  # a choice, which comes whole
            choice = ChunkChoice(delta=Delta(content=answer.text), logprobs=self._all_tokens(answer))
            rest = self._event([choice]) if answer.text else b""
        last = ChunkChoice(
            delta=Delta(),
            finish_reason=answer.finish_reason,
            confidence=answer.confidence,
            calibrated=answer.calibrated,
            choices=answer.choices,
        )
        usage = self._event([], self._usage(answer)) if self._asked.include_usage else b""
        return rest + self._event([last]) + usage + b"data: [DONE]\n\n"

    def _part(self, text: str, start: int, *, last: bool) -> bytes:
        new, tokens = "", list[TokenLogprob]()
        if text.startswith(self._sent):
            new, self._sent = text[len(self._sent) :], text
        if self._log is not None:
            self._log.add(*self._pending.tokens())
            tokens = self._log.take(start, start + len(self._sent), last=last)
        if not new and not tokens:
            return b""
        return self._event([ChunkChoice(delta=Delta(content=new), logprobs=Logprobs(content=tokens) if tokens else None)])

    def _event(self, choices: list[ChunkChoice], usage: Usage | None = None) -> bytes:
        return b"data: %b\n\n" % ChatCompletionChunk(**self._head, choices=choices, usage=usage).model_dump_json().encode()

    def _all_tokens(self, answer: Answer) -> Logprobs | None:
        if not self._asked.logprobs:
            return None
        texts = self._pending.token_texts()
        return Logprobs(content=tokens_of(texts, answer.token_ids, answer.token_logprobs, answer.text))

    def _usage(self, answer: Answer) -> Usage:
        prompt, completion = self._pending.prompt_tokens, len(answer.token_ids)
        details = PromptTokensDetails(image_tokens=self._image_tokens, text_tokens=prompt - self._image_tokens)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=details,
        )
