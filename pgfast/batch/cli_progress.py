"""How far a run is, on stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from datetime import timedelta
from types import TracebackType
from typing import Self

SECONDS_BETWEEN_LINES = 10.0
"""Without a terminal."""
_SECONDS_BETWEEN_LOOKS = 0.1
_LOOKS = 300
"""The rate is that of the last so many looks, half a minute at least."""


class Progress:
    """A bar with rate, time left and errors; without a terminal a line now and then.

    Args:
        total: All rows; None: nobody knows.
        done: Rows that are there already.
    """

    def __init__(self, total: int | None, done: int) -> None:
        self._total = total
        self._looks = deque([(time.monotonic(), done)], _LOOKS)
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True)
        self._terminal = console.is_terminal
        columns = (BarColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, disable=not self._terminal)
        self._task = self._bar.add_task("", total=self._total, completed=self._looks[0][1])
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, done: int, errors: int) -> None:
        """Say how many rows are there, and how many of them are errors; cheap enough for every row."""
        now = time.monotonic()
        if now - self._looks[-1][0] < _SECONDS_BETWEEN_LOOKS:
            return
        text = self._text(now, done, errors)
        self._looks.append((now, done))
        if self._terminal:
            total = None if self._total is None else max(self._total, done)
            self._bar.update(self._task, completed=done, total=total, description=text)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(f"pgfast: {text}", file=sys.stderr, flush=True)

    def _text(self, now: float, done: int, errors: int) -> str:
        then, before = self._looks[0]
        rate = (done - before) / max(now - then, 1e-9)
        parts = [f"{done:,} rows" if self._total is None else f"{done:,} of {max(self._total, done):,} rows", f"{rate:,.1f}/s"]
        if self._total is not None and rate > 0:
            parts.append(f"{timedelta(seconds=round(max(self._total - done, 0) / rate))} left")
        parts.append(f"{errors:,} errors")
        return ", ".join(parts)
