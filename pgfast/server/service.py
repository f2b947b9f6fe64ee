"""AnswerService: from a question to the engine and back, in the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pgfast.errors import PromptError
from pgfast.types import Answer, EncodedImage, GenerateOptions, Timings

from .admission import Admission
from .config import ServerConfig
from .http_errors import ApiError
from .metrics import Metrics
from .picture_cache import Encoded, PictureCache
from .remote_pictures import RemotePictures

if TYPE_CHECKING:
    from pgfast.engine import Engine
    from pgfast.pending import Pending


ENCODERS = 16
"""Threads beyond the decoding ones: those that wait for the vision encoder at the same time share its runs."""
FETCHES = 8
"""Pictures by URL that are fetched, or wait to be encoded, at a time."""
FETCH_SECONDS = 10.0
"""For one of them, if a request may take so long."""
QUICK_TEXT = 4096
"""Characters that are tokenized in the event loop."""
CHARACTERS_PER_TOKEN = 64
"""Longer texts cannot fit: the tokenizer, which keeps everybody waiting, is not asked."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One question about one picture: exactly one of `question` (the bundle's template goes around it) and `prompt` (raw)."""

    picture: bytes | EncodedImage
    """The bytes of a picture file, or a picture that is encoded already."""
    question: str | None = None
    prompt: str | None = None
    choices: tuple[str, ...] | None = None
    language: str = "en"
    options: GenerateOptions | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Served(Answer):
    """An answer with what the server knows of it; its times are the whole request's, from `AnswerService.answer` on."""

    width: int
    """Pixels of the picture as it was given."""
    height: int
    queue: float
    """Seconds of the total in which the question waited for others."""


class AnswerService:
    """Answers questions with an engine, for request handlers.

    Whoever waits for an answer may be cancelled at any time: its place in the queue or in the running batch is free then.

    Args:
        engine: Answers; stays the caller's to close.
        config: Limits.
    """

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.engine, self.config = engine, config
        self.model = engine.manifest.source.checkpoint.rstrip("/").rpartition("/")[2]
        """Name of the model, for clients."""
        self.metrics = Metrics(engine)
        self.admission = Admission(config, engine.load_figures().slots, self.metrics)
        self.fetch: Callable[[str], bytes] | None = None
        """Gets the picture behind a URL, in a thread; None: that is not allowed."""
        if config.allow_url_hosts:
            seconds = min(FETCH_SECONDS, config.timeout)
            self.fetch = RemotePictures(config.allow_url_hosts, max_bytes=config.max_body, timeout=seconds).fetch
        self._fetches, self._fetching = asyncio.Semaphore(FETCHES), ThreadPoolExecutor(FETCHES, "pgfast-fetch")
        self._pool = ThreadPoolExecutor(config.decoders + ENCODERS, "pgfast-picture")
        self._decoding = threading.Semaphore(config.decoders)
        self._pictures = PictureCache(self._encode, self._pool, config.cache_pictures, self.metrics)

    def warm(self) -> None:
        """Answer a question, so that the first client does not wait for what happens only once; blocks."""
        size = self.engine.manifest.image.size
        picture = np.zeros((size, size, 3), np.uint8)
        self.engine.answer(picture, "?", options=GenerateOptions(max_new_tokens=2))

    def close(self) -> None:
        """End the threads, after what they do now."""
        for pool in (self._pool, self._fetching):
            pool.shutdown(wait=False, cancel_futures=True)

    async def answer(self, ask: Ask) -> Served:
        """Answer a question.

        Raises:
            InputError: The picture, the text or an option cannot be used.
            PgfastError: The engine failed, or is too busy.
        """
        question = _Question(self, ask, streaming=False)
        pending = await question.submit()
        try:
            await question.news.wait()
            return question.finish(pending)
        finally:
            pending.cancel()

    async def stream(self, ask: Ask) -> AsyncGenerator[str | Served]:
        """Answer a question piece by piece; the whole answer comes last. Choices are one piece: the answer.

        Closing the generator ends the work. Raises what `answer` raises.
        """
        question, given, done = _Question(self, ask, streaming=True), "", False
        pending = await question.submit()
        try:
            while not done:
                done = await question.changed(pending)
                text = pending.text().strip()
                if text.startswith(given) and len(text) > len(given):
                    yield text[len(given) :]
                    given = text
            yield question.finish(pending)
        finally:
            pending.cancel()

    async def follow(self, ask: Ask, *, streaming: bool) -> AsyncGenerator[Pending]:
        """Yield the question each time that it has news, at last when it is done; without `streaming` only then.

        Closing the generator ends the work. Raises what `answer` raises.
        """
        question, done = _Question(self, ask, streaming=streaming), False
        pending = await question.submit()
        try:
            while not done:
                done = await question.changed(pending)
                if done:
                    question.finish(pending)
                yield pending
        finally:
            pending.cancel()

    async def fetch_picture(self, url: str) -> EncodedImage:
        """Get the picture behind a URL, encoded: its bytes, which no limit of bodies counts, are not kept waiting.

        Raises:
            ApiError: 400, that is not allowed.
            ImageError: It cannot be had.
        """
        if self.fetch is None:
            message = "pictures are not fetched from URLs here: send the picture itself, as base64"
            raise ApiError(400, "image_error", message, param="image")
        async with self._fetches:
            picture = await asyncio.get_running_loop().run_in_executor(self._fetching, self.fetch, url)
            return (await self._pictures.get(picture))[0]

    async def encoded(self, picture: bytes | EncodedImage) -> Encoded:
        """Return a picture encoded, from the cache if it can be."""
        return (picture, (0.0, 0.0)) if isinstance(picture, EncodedImage) else await self._pictures.get(picture)

    def _encode(self, picture: Callable[[], bytes]) -> Encoded:
        with self._decoding:
            start = time.perf_counter()
            prepared = self.engine.prepare_image(picture(), max_pixels=self.config.max_pixels)
            decoded = time.perf_counter()
        return self.engine.encode_image(prepared), (decoded - start, time.perf_counter() - decoded)


class _Question:
    """One question on its way: wakes the event loop, keeps the time."""

    def __init__(self, service: AnswerService, ask: Ask, *, streaming: bool) -> None:
        self._service, self._ask, self._streaming = service, ask, streaming
        self._loop = asyncio.get_running_loop()
        self._start = time.perf_counter()
        self.news = asyncio.Event()

    async def submit(self) -> Pending:
        """Get the picture encoded and put the question into the running batch."""
        ask = self._ask
        self._check_lengths()
        self._image, (self._preprocess, self._vision) = await self._service.encoded(ask.picture)
        size = len(ask.question or "") + len(ask.prompt or "") + sum(map(len, ask.choices or ()))
        self._submitted = time.perf_counter()
        if size <= QUICK_TEXT:
            return self._submit()
        submitting = self._loop.run_in_executor(None, self._submit)
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:  # the thread goes on, and its question would be answered for nobody
            submitting.add_done_callback(_cancel)
            raise

    def _check_lengths(self) -> None:
        limits = self._service.engine.manifest.limits
        texts = (self._ask.question, limits.prompt_tokens), (self._ask.prompt, limits.prompt_tokens)
        choices = ((choice, limits.new_tokens) for choice in self._ask.choices or ())
        for text, most in (*texts, *choices):
            if text is not None and len(text) > CHARACTERS_PER_TOKEN * most:
                raise PromptError(f"a text has {len(text):,} characters: this model takes at most {most} tokens")

    def _submit(self) -> Pending:
        ask = self._ask
        return self._service.engine.submit(
            self._image,
            ask.question,
            prompt=ask.prompt,
            choices=ask.choices,
            language=ask.language,
            options=ask.options,
            streaming=self._streaming,
            on_progress=self._on_progress,
        )

    def _on_progress(self) -> None:  # in the engine's thread
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self.news.set)

    async def changed(self, pending: Pending) -> bool:
        """Wait for news; returns whether it was the end."""
        await self.news.wait()
        self.news.clear()
        return pending.done

    def finish(self, pending: Pending) -> Served:
        """Take the answer, and count it."""
        answer, before = pending.result(0), self._submitted - self._start
        engine, metrics = answer.timings, self._service.metrics
        later = len(answer.token_ids) - 1
        metrics.first_token.observe(before + engine.ttft)
        if later > 0:
            metrics.later_token.observe(engine.decode / later)
        preprocess, ttft, total = engine.preprocess + self._preprocess, before + engine.ttft, before + engine.total
        return Served(
            answer.text,
            answer.confidence,
            answer.token_ids,
            answer.token_logprobs,
            answer.finish_reason,
            answer.choices,
            Timings(preprocess, self._vision, engine.prefill, engine.decode, ttft, total),
            answer.calibrated,
            answer.unsure_of,
            width=self._image.width,
            height=self._image.height,
            queue=max(0.0, total - preprocess - self._vision - engine.prefill - engine.decode),
        )


def _cancel(submitting: asyncio.Future[Pending]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
