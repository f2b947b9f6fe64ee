"""Turns: in the order of asking, one at a time, and nobody who leaves the line stops the others."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from pgfast.runtime.turns import Turns


def wait_for_line(turns: Turns, length: int) -> None:
    deadline = time.monotonic() + 20
    while len(turns._line) < length:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_turns_come_in_the_order_of_asking() -> None:
    turns, order = Turns(), list[int]()

    def take(number: int) -> None:
        with turns:
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    with turns:
        for number, thread in enumerate(threads):
            thread.start()
            wait_for_line(turns, number + 2)
        order.append(-1)
    with turns:  # behind all of them
        order.append(6)
    for thread in threads:
        thread.join()
    assert order == [-1, 0, 1, 2, 3, 4, 5, 6]


def test_two_loops_alternate() -> None:
    turns, order = Turns(), list[str]()

    def loop(name: str) -> None:
        for _ in range(20):
            with turns:
                order.append(name)
                if len(order) < 40:
                    time.sleep(0.002)

    threads = [threading.Thread(target=loop, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "ababababababab" in "".join(order)


def test_who_is_interrupted_leaves_the_line() -> None:
    turns, held, done, main = Turns(), threading.Event(), threading.Event(), threading.get_ident()

    def hold() -> None:
        with turns:
            held.set()
            wait_for_line(turns, 2)
            signal.pthread_kill(main, signal.SIGINT)
            assert done.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with pytest.raises(KeyboardInterrupt), turns:
        pass
    done.set()
    holder.join()
    with turns:
        pass
    assert not turns._line
