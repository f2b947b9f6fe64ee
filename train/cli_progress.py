"""Progress on stderr, of training and of evaluation."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_LINES = 10.0
"""Without a terminal."""
ALWAYS_SHOWN = ("trainable parameters", "continuing", "evaluated")


class ProgressBars:
    """One progress bar per stage on stderr, or a line now and then when that is not a terminal.

    Args:
        shown: Whether this process draws.
    """

    def __init__(self, shown: bool = True) -> None:
        self._shown, self._last = shown, 0.0

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._terminal = console.is_terminal and self._shown
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        text = "{task.description} {task.fields[message]}"
        self._bar = Progress(TextColumn(text), *columns, console=console, disable=not self._terminal)
        self._tasks: dict[str, Any] = {}
        self._bar.start()
        return self._update

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def _update(self, stage: str, done: int, total: int, message: str = "") -> None:
        if not self._shown:
            return
        if self._terminal:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total, message="")
            self._bar.update(self._tasks[stage], completed=done, total=total, message=message)
        elif done == total or stage in ALWAYS_SHOWN or time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"{stage} {done}/{total} {message}".rstrip(), file=sys.stderr, flush=True)
