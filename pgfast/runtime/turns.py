"""A lock that goes from hand to hand in the order of asking."""

from __future__ import annotations

import threading

STALL = 0.05
"""Seconds: so long may work of several newcomers hold up all others when one alone would be quicker."""


class Turns:
    """Who has finished and asks again stands behind those who wait; with `threading.Lock` a loop could keep all others out.

    Ctrl-C may come while `__exit__` begins, or just behind `__enter__`; a thread that can be interrupted calls `leave` once
    more, whatever happened.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the line, only for moments
        self._line: dict[int, threading.Lock] = {}
        """By thread, in order. The first one has its turn, the others wait for theirs to be released."""

    def __enter__(self) -> None:
        mine = threading.Lock()
        mine.acquire()
        try:
            with self._lock:
                self._line[threading.get_ident()] = mine
                if next(iter(self._line.values())) is mine:
                    return
            mine.acquire()
        except BaseException:  # Ctrl-C
            self.leave()
            raise

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Give this thread's turn, or its place in the line, to the next one; again: nothing."""
        me = threading.get_ident()
        with self._lock:
            if me not in self._line:
                return
            first, *others = self._line
            # released before it is noted: if Ctrl-C comes between, the second call does both again
            if first == me and others and self._line[others[0]].locked():
                self._line[others[0]].release()
            del self._line[me]
