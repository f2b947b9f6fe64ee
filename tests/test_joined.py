"""Joined runs: threads that wait for the vision encoder share its next run, and get their own rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from pgfast.runtime.joined import JoinedRuns
from pgfast.runtime.turns import Turns


class Encoder:
    """Squares its rows; the first run waits until it is let go."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()
        self.fails: Callable[[np.ndarray], None] = lambda rows: None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        self.sizes.append(len(rows))
        if len(self.sizes) == 1:
            assert self.go.wait(20)
        self.fails(rows)
        return rows**2


def ask_together(encoder: Encoder, joined: JoinedRuns, asked: list[np.ndarray]) -> list[np.ndarray | BaseException]:
    """All ask while the first run is held, in this order; what each got."""
    got: list[np.ndarray | BaseException] = [np.empty(0)] * len(asked)

    def ask(number: int) -> None:
        try:
            got[number] = joined(asked[number])
        except BaseException as error:  # noqa: BLE001
            got[number] = error

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for number, thread in enumerate(threads):
        thread.start()
        deadline = time.monotonic() + 20
        while len(joined._waiting) <= number or not encoder.sizes:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    encoder.go.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not joined._waiting
    return got


def rows(*numbers: float) -> np.ndarray:
    return np.array(numbers)[:, None]


@pytest.mark.parametrize("turns", [None, Turns()])
def test_those_who_wait_share_a_run_and_get_their_own_rows(turns: Turns | None) -> None:
    encoder = Encoder()
    joined = JoinedRuns(encoder, turns, most=4, stall=1e9)
    asked = [rows(1), rows(2), rows(3, 4), rows(5), rows(6, 7, 8), rows(9)]
    for given, got in zip(asked, ask_together(encoder, joined, asked), strict=True):
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, given**2)
        assert got.base is None or got.base.shape == got.shape  # does not keep the neighbours' rows
    assert encoder.sizes == [1, 4, 4]


def test_slow_rows_are_not_joined_and_large_requests_are_not_refused() -> None:
    encoder = Encoder()
    got = ask_together(encoder, JoinedRuns(encoder, None, most=4, stall=0.0), [rows(1), rows(2), rows(3, 4, 5, 6, 7), rows(8)])
    assert [len(each) for each in got if isinstance(each, np.ndarray)] == [1, 1, 5, 1]
    assert sorted(encoder.sizes) == [1, 1, 1, 5]


def test_a_failing_run_fails_its_own_and_the_next_is_fine() -> None:
    encoder = Encoder()

    def fails(given: np.ndarray) -> None:
        if 2 in given:
            raise ValueError("two")

    encoder.fails = fails
    got = ask_together(encoder, JoinedRuns(encoder, Turns(), most=2, stall=1e9), [rows(1), rows(2), rows(3), rows(4)])
    assert [isinstance(each, ValueError) for each in got] == [False, True, True, False]


def test_who_is_interrupted_leaves_the_others_their_answers() -> None:
    encoder = Encoder()

    def fails(given: np.ndarray) -> None:
        if len(encoder.sizes) == 2:
            raise KeyboardInterrupt

    encoder.fails = fails
    got = ask_together(encoder, JoinedRuns(encoder, Turns(), most=4, stall=1e9), [rows(1), rows(2), rows(3), rows(4)])
    assert sum(isinstance(each, KeyboardInterrupt) for each in got) == 1
    right = [each for each in got if isinstance(each, np.ndarray)]
    assert len(right) == 3
    assert {float(each[0, 0]) for each in right} < {1.0, 4.0, 9.0, 16.0}
