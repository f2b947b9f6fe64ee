"""Runs of the vision encoder that several threads ask for at once, made one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .turns import Turns

Array = NDArray[Any]


class _Asked:
    """Rows that a thread waits for."""

    def __init__(self, rows: Array) -> None:
        self.rows = rows
        self.result: Array | None = None
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.result is not None or self.error is not None


class JoinedRuns:
    """A function of independent rows; who has the turn takes along the rows of those who wait behind it.

    Args:
        run: Array [B, ...] to array [B, ...].
        turns: Held for each run; None: nothing else runs on the device, or at no cost.
        most: Rows of different threads that may share a run.
        stall: Seconds that a run of several threads' rows may take, because others wait for their turn meanwhile.
    """

    def __init__(self, run: Callable[[Array], Array], turns: Turns | None, *, most: int, stall: float) -> None:
        self._run, self._turns, self._most, self._stall = run, turns, most, stall
        self._order = threading.Lock()  # one asks for a turn at a time, so that the decoder has every second one
        self._waiting: dict[int, _Asked] = {}  # in order; each use of it is one step of the interpreter
        self._row_seconds = float("inf")  # of one row, in the last run

    def __call__(self, rows: Array) -> Array:
        """Return the rows of the result, in memory of their own; raises what the run raises."""
        asked = _Asked(rows)
        self._waiting[id(asked)] = asked
        try:
            with self._order:
                while not asked.done:
                    with self._turns or nullcontext():
                        self._run_next()
        finally:
            if self._turns is not None:
                self._turns.leave()  # Ctrl-C may have come into the middle of the turn's end
            self._waiting.pop(id(asked), None)
        if asked.error is not None:
            raise asked.error
        assert asked.result is not None
        return asked.result

    def _run_next(self) -> None:
        most = min(self._most, int(self._stall / self._row_seconds))
        group: list[_Asked] = []
        total = 0
        for asked in list(self._waiting.values()):
            if group and total + len(asked.rows) > most:
                break
            group.append(asked)
            total += len(asked.rows)
        start = time.perf_counter()
        try:
            joined = self._run(np.concatenate([asked.rows for asked in group]) if len(group) > 1 else group[0].rows)
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait
            for asked in group:
                asked.error = error
        else:
            self._row_seconds = max(time.perf_counter() - start, 1e-6) / total
            parts = np.split(joined, np.cumsum([len(asked.rows) for asked in group])[:-1])
            for asked, part in zip(group, parts, strict=True):
                # a picture kept for later must not keep its neighbours
                asked.result = part.copy() if len(group) > 1 else part
        for asked in group:
            self._waiting.pop(id(asked), None)
