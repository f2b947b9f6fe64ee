"""Requests of all callers in one running batch: each joins between two tokens of the others and leaves when it is done.

One thread owns the decoder (CUDA graphs belong to a thread, too). Callers hand it a request and wait on their ticket. Between
two steps it lets newcomers in, first come, first served, into the lowest free slots. A request of several beams takes all its
slots at once; until so many are free it holds up those behind it, so it cannot starve, and nobody waits with a part of his.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice, takewhile
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pgfast.errors import OverloadedError, PgfastError

from .decoder import Chosen
from .generation import Row
from .ticket import Ticket


class Slots(Protocol):
    """What the scheduler needs of a decoder (`Decoder` says what each does)."""

    slots: int

    def prompt(self, image_features: NDArray[Any], prompts: list[list[int]], first: int = 0) -> Chosen: ...  # noqa: D102
    def step(self, rows: int, tokens: NDArray[np.int64] | None = None, burst: int = 1) -> Chosen: ...  # noqa: D102
    def logits(self, row: int) -> NDArray[np.float32]: ...  # noqa: D102
    def rewind(self, row: int, length: int) -> None: ...  # noqa: D102
    def copy(self, source: int, target: int, first: int = 0) -> None: ...  # noqa: D102
    def release(self, row: int) -> None: ...  # noqa: D102


class Scheduler:
    """The queue, the slots, and the thread that runs them, started by the first request.

    Args:
        decoder: Owned by the thread from now on.
        max_waiting: Refuse requests when so many wait for a slot; None: never.
        together: Patient newcomers whose prompts may share a run. For the others that would only be fair if two prompts
            took no longer than one, and arithmetic limits a prompt.
        turns: Held for every run of the decoder; None: nothing else runs on its device, or at no cost.
        max_burst: Steps that may run without a look at their tokens, when nobody could join or leave meanwhile.
        stall: Seconds that the prompts of newcomers may hold up the others between two steps; one prompt is always let in.
    """

    def __init__(
        self,
        decoder: Slots,
        *,
        max_waiting: int | None = None,
        together: int = 1,
        turns: AbstractContextManager[Any] | None = None,
        max_burst: int = 1,
        stall: float = 0.0,
    ) -> None:
        self.decoder = decoder
        self.on_step: Callable[[int], None] | None = None
        """Called in the thread with the number of rows of each run of the decoder."""
        self._turns = turns or nullcontext()
        self.max_waiting = max_waiting
        self._together, self._max_burst, self._stall = together, max_burst, stall
        # guards the next three; entered by itself, because Ctrl-C can come into the middle of the condition's `with`
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[Ticket] = deque()
        self._closed = False
        self._thread: threading.Thread | None = None
        # the thread's own
        self._running: dict[int, Ticket] = {}  # by slot
        self._next = np.zeros(decoder.slots, np.int64)  # token to append to each slot
        self._prompt_seconds = float("inf")  # of one prompt, in the last run of prompts

    def load(self) -> tuple[int, int]:
        """Return how many requests wait and how many slots are taken."""
        return len(self._waiting), len(self._running)

    def submit(
        self,
        row: Row,
        image_features: NDArray[Any],
        prompt: list[int],
        *,
        streaming: bool = False,
        patient: bool = False,
        on_start: Callable[[], None] | None = None,
        on_progress: Callable[[], None] | None = None,
    ) -> Ticket:
        """Put a request at the end of the queue.

        Args:
            row: Takes the tokens, in the scheduler's thread; not wider than there are slots.
            image_features: [1, P, D].
            prompt: Ids, `<bos>` to newline.
            streaming: Let `Ticket.progress` report every token, not only the end.
            patient: The caller waits for many others too, so these may be let in before it goes on.
            on_start: Called when the request leaves the queue, in whatever way.
            on_progress: Called at the end, and with `streaming` after every token; in the scheduler's thread.

        Raises:
            OverloadedError: Too many are waiting.
            PgfastError: The scheduler is closed.
        """
        assert row.width <= self.decoder.slots
        ticket = Ticket(self, row, image_features, prompt)
        ticket.streaming, ticket.patient = streaming, patient
        ticket.on_start, ticket.on_progress = on_start, on_progress
        with self._lock:
            if self._closed:
                raise _closed()
            if self.max_waiting is not None and len(self._waiting) >= self.max_waiting:
                raise OverloadedError(f"{len(self._waiting)} requests are waiting already: try again later")
            if self._thread is None:
                self._start_thread()
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._work, name="pgfast-scheduler", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # there are too many, or Ctrl-C; should it run after all, it finds that it is not the one
            self._thread = None
            raise

    def cancel(self, ticket: Ticket) -> None:
        """Take a request out; one that is running leaves before the next step."""
        with self._lock:
            if ticket.finished:
                return
            ticket.cancelled = True
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
        ticket.start()
        ticket.finish(_cancelled())

    def close(self) -> None:
        """Fail all requests and end the thread, after the run that it is in; again, or in a fork of the process: nothing."""
        if os.getpid() != self._process:  # the lock may be held by a thread that is not here
            return
        with self._lock:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for ticket in left:
            ticket.start()
            ticket.finish(_closed())
        # the last reference to an engine may be dropped in the thread itself
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._thread is not threading.current_thread():
                    return
                while not (self._waiting or self._running or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
            try:
                self._drop_cancelled()
                self._admit()
                if self._running:
                    self._step()
            except Exception as error:  # noqa: BLE001 - it belongs to those who wait; the next requests may be luckier
                self._fail_running(error)
        self._fail_running(_closed())

    def _tickets(self) -> list[Ticket]:
        return list(dict.fromkeys(self._running.values()))

    def _drop_cancelled(self) -> None:
        for ticket in self._tickets():
            if ticket.cancelled:
                self._leave(ticket, _cancelled())

    def _admit(self) -> None:
        """Run the prompts of newcomers: one between two steps, more while they are quick or nobody minds."""
        start = time.perf_counter()
        while newcomers := self._take_newcomers():
            self._run_prompts(newcomers)
            patient = all(ticket.patient for ticket in self._running.values())
            if not patient and time.perf_counter() - start + self._prompt_seconds > self._stall:
                return

    def _take_newcomers(self) -> list[Ticket]:
        """Move those from the queue into neighbouring slots whose prompts share the next run; several beams come alone."""
        free = [slot for slot in range(self.decoder.slots) if slot not in self._running]
        neighbours = sum(slot == free[0] + i for i, slot in enumerate(free))
        quick = int(self._stall / self._prompt_seconds)
        with self._lock:
            together = list(islice(self._waiting, min(neighbours, self._together)))
            together = list(takewhile(lambda ticket: ticket.image_tokens == together[0].image_tokens, together))
            if together and together[0].row.width > 1:
                together = together[:1] if together[0].row.width <= len(free) else []
            together = list(takewhile(lambda ticket: ticket.row.width == together[0].row.width, together))
            patient = sum(1 for _ in takewhile(lambda ticket: ticket.patient, together))
            newcomers = together[: max(patient, quick, 1)]
            for ticket in newcomers:
                self._waiting.popleft()
                ticket.slots, free = free[: ticket.row.width], free[ticket.row.width :]
                self._running |= dict.fromkeys(ticket.slots, ticket)  # under the lock: a ticket is always in one of the two
        return newcomers

    def _run_prompts(self, newcomers: list[Ticket]) -> None:
        parts: list[Any] = [ticket.image_features for ticket in newcomers]
        # one alone as it is: it may be on the device
        features = np.concatenate(parts) if len(parts) > 1 else parts[0]  # [B, P, D]
        prompts = [ticket.prompt for ticket in newcomers]
        for ticket in newcomers:
            ticket.start()
        with self._turns:
            begun = time.perf_counter()
            chosen = self.decoder.prompt(features, prompts, newcomers[0].slots[0])
        now = time.perf_counter()
        self._prompt_seconds = max(now - begun, 1e-6) / len(newcomers)
        if self.on_step is not None:
            self.on_step(len(newcomers))
        for ticket, token, logprob in zip(newcomers, chosen.tokens[0].tolist(), chosen.logprobs[0].tolist(), strict=True):
            ticket.begun, ticket.first_token = begun, now
            self._advance(ticket, token, logprob, now)

    def _step(self) -> None:
        ahead = min(ticket.row.ahead for ticket in self._tickets())
        tokens = self._next[: max(self._running) + 1]
        with self._turns:
            chosen = self.decoder.step(len(tokens), None if ahead else tokens, self._burst(ahead))
        now = time.perf_counter()
        if self.on_step is not None:
            self.on_step(len(self._running))
        for best, logprobs in zip(chosen.tokens.tolist(), chosen.logprobs.tolist(), strict=True):
            for ticket in self._tickets():
                self._advance(ticket, best[ticket.slots[0]], logprobs[ticket.slots[0]], now)

    def _burst(self, ahead: int) -> int:
        """How many steps to run at once: more than one only if no token is needed here and nobody waits.

        A row may end within a burst, but none may run out of room: `ahead` is the nearest limit.
        """
        return 1 if self._waiting else max(1, min(self._max_burst, ahead))

    def _advance(self, ticket: Ticket, token: int, logprob: float, now: float) -> None:
        try:
            following = ticket.row.advance(token, logprob, ticket)
        except Exception as error:  # noqa: BLE001 - this request's own
            self._leave(ticket, error)
            return
        ticket.ended = now
        if following is None:
            self._leave(ticket, None)
            return
        self._next[ticket.slots] = following
        if ticket.streaming:
            ticket.tell()

    def _leave(self, ticket: Ticket, error: BaseException | None) -> None:
        for slot in ticket.slots:
            del self._running[slot]
            try:
                self.decoder.release(slot)
            except Exception as failed:  # noqa: BLE001 - the thread has others to serve
                error = error or failed
        ticket.finish(error)

    def _fail_running(self, error: BaseException) -> None:
        for ticket in self._tickets():
            self._leave(ticket, error)


def _closed() -> PgfastError:
    return PgfastError("the engine is closed: load the bundle again")


def _cancelled() -> PgfastError:
    return PgfastError("the request was cancelled")
