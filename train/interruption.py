"""Ctrl-C and SIGTERM end a run after the step it is in, with its state saved; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notes the first signal while it is active.

    Args:
        active: Off for several processes: they would stop at different steps, and wait for each other.
    """

    def __init__(self, active: bool) -> None:
        # only the main thread may set handlers; elsewhere (a notebook's worker) signals do what they always do
        self._active = active and threading.current_thread() is threading.main_thread()
        self.signal: int | None = None

    def __enter__(self) -> Self:
        if self._active:
            # what is ignored stays ignored: a job in the background must not hear the terminal's Ctrl-C
            heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._active:
            self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
