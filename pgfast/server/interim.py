"""What the engine will have itself: `submit`, `prepare_image`, `load_figures`; until then a thread per question."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

import pgfast
from pgfast.engine import Engine as RealEngine
from pgfast.image import open_image
from pgfast.types import Answer, EncodedImage, GenerateOptions


@dataclass(frozen=True)
class LoadFigures:
    """How busy the decoder is."""

    waiting: int
    running: int
    slots: int


class Pending:
    """An answer that is on its way."""

    def __init__(self) -> None:
        self.future: Future[Answer] = Future()

    @property
    def done(self) -> bool:
        """Whether it is there."""
        return self.future.done()

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for it."""
        try:
            return self.future.result(timeout)
        except FutureTimeout as error:
            raise TimeoutError from error

    def text(self) -> str:
        """What may be shown already."""
        return self.future.result().text if self.done and not self.future.exception() else ""

    def cancel(self) -> None:
        """Give up."""


class Engine(RealEngine):
    """An engine with `submit`."""

    on_step: Callable[[int], None] | None = None

    def prepare_image(self, image: Any, *, max_pixels: int | None = None) -> Any:
        """Decode."""
        return open_image(image)

    def load_figures(self) -> LoadFigures:
        """How busy the decoder is."""
        return LoadFigures(0, 0, 16)

    def submit(
        self,
        image: EncodedImage,
        question: str | None = None,
        *,
        prompt: str | None = None,
        choices: Sequence[str] | None = None,
        language: str = "en",
        options: GenerateOptions | None = None,
        on_progress: Callable[[], None] | None = None,
        streaming: bool = False,
    ) -> Pending:
        """Start a question."""
        pending = Pending()

        def work() -> None:
            try:
                if prompt is None:
                    answer = self.answer(image, question or "", choices=choices, language=language, options=options)
                else:
                    answer = self.generate(image, prompt, options=options)
                pending.future.set_result(answer)
            except Exception as error:  # noqa: BLE001
                pending.future.set_exception(error)
            if on_progress:
                on_progress()

        threading.Thread(target=work, daemon=True).start()
        return pending


def load(*args: Any, **kwargs: Any) -> Engine:
    """`pgfast.load` with the methods above."""
    engine = pgfast.load(*args, **kwargs)
    engine.__class__ = Engine
    return engine  # type: ignore[return-value]
