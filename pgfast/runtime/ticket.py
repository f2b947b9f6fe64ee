"""One request on its way through the running batch, and what its caller holds of it."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Generator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .generation import Row

logger = logging.getLogger(__name__)


class Logits(Protocol):
    """What a ticket needs of the decoder."""

    def logits(self, row: int) -> NDArray[np.float32]: ...  # noqa: D102
    def rewind(self, row: int, length: int) -> None: ...  # noqa: D102
    def copy(self, source: int, target: int, first: int = 0) -> None: ...  # noqa: D102


class Owner(Protocol):
    """What a ticket needs of the scheduler."""

    @property
    def decoder(self) -> Logits: ...  # noqa: D102
    def cancel(self, ticket: Ticket) -> None: ...  # noqa: D102


class Ticket:
    """One request, from `Scheduler.submit` to its end; it is also the request's position in the decoder."""

    def __init__(self, scheduler: Owner, row: Row, image_features: NDArray[Any], prompt: list[int]) -> None:
        self.row = row
        self.begun = self.first_token = self.ended = 0.0
        """`time.perf_counter` when the prompt's run began, when the first token was there, and at the last one."""
        self.streaming = self.patient = False
        self.on_start: Callable[[], None] | None = None
        self.on_progress: Callable[[], None] | None = None
        self.image_features: NDArray[Any] | None = image_features
        self.prompt = prompt
        self.error: BaseException | None = None
        self.cancelled = self.finished = False
        self.slots: list[int] = []
        """Its places in the decoder, `row.width` of them; the prompt runs in the first."""
        self.image_tokens = image_features.shape[1]
        self.prompt_length = self.image_tokens + len(prompt)
        self._scheduler = scheduler
        # a put for each token when streaming, and one at the end
        self.news: queue.SimpleQueue[None] = queue.SimpleQueue()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end; an interrupted wait cancels the request.

        Args:
            timeout: Seconds; None: as long as it takes.

        Raises:
            PgfastError: A run failed, the request was cancelled, or the engine was closed.
            TimeoutError: It is not finished; the work goes on.
        """
        end = None if timeout is None else time.monotonic() + timeout
        try:
            while not self.finished:
                self.news.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise TimeoutError(f"no answer within {timeout:g} seconds") from None
        except BaseException:  # Ctrl-C
            self.cancel()
            raise
        self.news.put(None)  # for whoever else waits
        if self.error is not None:
            raise self.error

    def progress(self) -> Generator[bool]:
        """Yield whether `row` is complete, each time that it has changed; leaving early cancels the request.

        Raises:
            PgfastError: As in `wait`.
        """
        finished = False
        try:
            while not finished:
                self.news.get()
                finished = self.finished
                if self.error is not None:
                    raise self.error
                yield finished
        finally:
            self.news.put(None)  # for whoever else waits
            self.cancel()  # the reader was interrupted or has enough; otherwise nothing happens

    def cancel(self) -> None:
        """Free the slot, or the place in the queue; nothing happens to a request that is finished."""
        self._scheduler.cancel(self)

    def logits(self, place: int = 0) -> NDArray[np.float32]:
        """Return float32 [V] of the last position in one of its places; for the row, while it advances."""
        return self._scheduler.decoder.logits(self.slots[place])

    def rewind(self, depth: int) -> None:
        """Forget all but the prompt and `depth` tokens; for the row, while it advances."""
        self._scheduler.decoder.rewind(self.slots[0], self.prompt_length + depth)

    def copy(self, source: int, target: int, *, whole: bool) -> None:
        """Let one place go on from where another one stands; without `whole` it has the prompt already."""
        first = 0 if whole else self.prompt_length
        self._scheduler.decoder.copy(self.slots[source], self.slots[target], first)

    def start(self) -> None:
        """Leave the queue: the features are not needed after the prompt."""
        self.image_features = None
        if self.on_start is not None:
            self.on_start()

    def finish(self, error: BaseException | None = None) -> None:
        """Tell those who wait."""
        self.error = error
        self.finished = True
        self.tell()

    def tell(self) -> None:
        """Wake those who wait, after a token or at the end."""
        self.news.put(None)
        if self.on_progress is not None:
            try:
                self.on_progress()
            except Exception:  # the caller's own, and this is a thread that all share
                logger.exception("a question's on_progress failed")
