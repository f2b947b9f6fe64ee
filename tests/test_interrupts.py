"""Ctrl-C at every place where Python may raise it, threads that do not start: whoever comes next is answered all the same."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from fake_decoder import FakeDecoder, fake_features

import pgfast
from pgfast import Engine, GenerateOptions
from pgfast.runtime.generation import Ending, Generation
from pgfast.runtime.scheduler import Scheduler, Ticket

PLACES = {"threading.py", "engine.py", "model.py", "scheduler.py", "turns.py"}
OPTIONS = GenerateOptions(max_new_tokens=3)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return pgfast.load(provider="cpu")


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def interrupted(number: int, work: Callable[[], Any]) -> bool:
    """Do the work and raise KeyboardInterrupt when its call of this number begins; False if there are fewer calls.

    The interpreter looks for signals at the beginning of functions (and after calls and at jumps backwards).
    """
    seen = 0

    def trace(frame: FrameType, event: str, arg: object) -> None:
        nonlocal seen
        if event == "call" and Path(frame.f_code.co_filename).name in PLACES:
            seen += 1
            if seen == number:
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    except RuntimeError as error:
        assert str(error) == "release unlocked lock"  # noqa: PT017 - the interrupted `Thread.start` itself says so
        return True
    finally:
        sys.settrace(before)
    return False


def works(kind: str, engine: Engine) -> Callable[[], Any]:
    if kind == "answer":
        return lambda: engine.answer(picture(0), "red", options=OPTIONS)
    if kind == "stream":
        return lambda: list(engine.stream(picture(0), "red", options=OPTIONS))
    return lambda: engine.answer_batch([(picture(seed), "red") for seed in range(12)], options=OPTIONS)


def elsewhere(work: Callable[[], Any]) -> list[Any]:
    """What the work gives in another thread; nothing if it never ends."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(timeout=20)
    return found


@pytest.mark.parametrize("kind", ["answer", "stream", "batch"])
def test_ctrl_c_anywhere_leaves_the_engine_usable(engine: Engine, kind: str) -> None:
    work, number = works(kind, engine), 0
    wanted = engine.answer(picture(1), "red", options=OPTIONS)
    while interrupted(number := number + 1, work):
        found = elsewhere(lambda: engine.answer(picture(1), "red", options=OPTIONS))
        assert found, f"an interrupt at call {number} stops all others"
        assert found[0].token_ids == wanted.token_ids
    assert number > 10


def ask(scheduler: Scheduler, prompt: int) -> Ticket:
    row = Generation(OPTIONS, Ending(3, eos_id=-1))
    ticket = scheduler.submit(row, fake_features(0), [prompt])
    ticket.wait()
    return ticket


def test_ctrl_c_while_the_thread_starts() -> None:
    number, stopped = 0, True
    while stopped:
        number += 1
        scheduler = Scheduler(FakeDecoder(1))
        stopped = interrupted(number, partial(ask, scheduler, 2))
        assert elsewhere(partial(ask, scheduler, 2)), f"an interrupt at call {number} stops all others"
        scheduler.close()
        assert len(scheduler.decoder.threads) == 1
    assert number > 10


def test_a_thread_that_does_not_start_is_started_by_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    for asks_again in (False, True):
        scheduler = Scheduler(FakeDecoder(1))
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError, match="new thread"):
                ask(scheduler, 2)
        if asks_again:
            ask(scheduler, 3)
        scheduler.close()  # otherwise there is nothing to wait for
        assert [run[2] for run in scheduler.decoder.runs if run[0] == "prompt"] == [[(3,)]] * asks_again
