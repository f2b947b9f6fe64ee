"""A lock that goes from hand to hand in the order of asking."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """Who has finished and asks again stands behind those who wait; with `threading.Lock` a loop could keep all others out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the line, only for moments
        self._line: deque[threading.Lock] = deque()
        """The first one has its turn, the others wait for theirs to be released."""

    def __enter__(self) -> None:
        mine = threading.Lock()
        mine.acquire()
        try:
            with self._lock:
                self._line.append(mine)
                if self._line[0] is mine:
                    return
            mine.acquire()
        except BaseException:  # Ctrl-C
            self._leave(mine)
            raise

    def __exit__(self, *_: object) -> None:
        self._leave(self._line[0])

    def _leave(self, mine: threading.Lock) -> None:
        with self._lock:
            if mine not in self._line:
                return
            first = self._line[0] is mine
            self._line.remove(mine)
            if first and self._line:
                self._line[0].release()
