"""AnswerService: from a question to the engine and back, in the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import Request

from pgfast.types import Answer, EncodedImage, GenerateOptions

from .config import ServerConfig

if TYPE_CHECKING:
    from .interim import Engine, Pending

logger = logging.getLogger(__name__)
T = TypeVar("T")


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
        self._pool = ThreadPoolExecutor(config.decoders + 8, "pgfast-picture")
        self._decoding = threading.Semaphore(config.decoders)

    async def answer(self, ask: Ask) -> Answer:
        """Answer a question.

        Raises:
            ApiError: It took too long (504), or there is too much to do (429, 503).
            InputError: The picture, the text or an option cannot be used.
        """
        done = asyncio.Event()
        pending, _ = await self._submit(ask, done, streaming=False)
        try:
            await done.wait()
            return pending.result(0)
        finally:
            pending.cancel()

    async def stream(self, ask: Ask) -> AsyncGenerator[str | Answer]:
        """Answer a question piece by piece; the pieces add up to the text, and the whole answer comes last.

        Closing the generator ends the work. Raises what `answer` raises.
        """
        news, given = asyncio.Event(), ""
        pending, _ = await self._submit(ask, news, streaming=True)
        try:
            while not pending.done:
                await news.wait()
                news.clear()
                text = pending.text()
                if text.startswith(given) and len(text) > len(given):
                    yield text[len(given) :]
                    given = text
            answer = pending.result(0)
            if answer.text.startswith(given) and len(answer.text) > len(given):
                yield answer.text[len(given) :]
            yield answer
        finally:
            pending.cancel()

    async def _submit(self, ask: Ask, news: asyncio.Event, *, streaming: bool) -> tuple[Pending, float]:
        loop = asyncio.get_running_loop()

        def on_progress() -> None:  # in the engine's thread
            loop.call_soon_threadsafe(news.set)

        start = time.perf_counter()
        image = ask.picture
        if not isinstance(image, EncodedImage):
            image = await loop.run_in_executor(self._pool, self._encode, image)
        pending = self.engine.submit(
            image,
            ask.question,
            prompt=ask.prompt,
            choices=ask.choices,
            language=ask.language,
            options=ask.options,
            on_progress=on_progress,
            streaming=streaming,
        )
        return pending, start

    def _encode(self, picture: bytes) -> EncodedImage:
        with self._decoding:
            prepared = self.engine.prepare_image(picture, max_pixels=self.config.max_pixels)
        return self.engine.encode_image(prepared)


async def with_disconnect(request: Request, awaitable: Awaitable[T]) -> T:
    """Await something, and cancel it when the client goes away."""
    task = asyncio.current_task()
    assert task is not None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await awaitable
    finally:
        watching.cancel()
