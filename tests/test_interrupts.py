"""Ctrl-C at every place where Python may raise it: whoever comes next is answered all the same."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import pgfast
from pgfast import Engine, GenerateOptions

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
    finally:
        sys.settrace(before)
    return False


def works(kind: str, engine: Engine) -> Callable[[], Any]:
    if kind == "answer":
        return lambda: engine.answer(picture(0), "red", options=OPTIONS)
    if kind == "stream":
        return lambda: list(engine.stream(picture(0), "red", options=OPTIONS))
    return lambda: engine.answer_batch([(picture(seed), "red") for seed in range(12)], options=OPTIONS)


@pytest.mark.parametrize("kind", ["answer", "stream", "batch"])
def test_ctrl_c_anywhere_leaves_the_engine_usable(engine: Engine, kind: str) -> None:
    work, number = works(kind, engine), 0
    wanted = engine.answer(picture(1), "red", options=OPTIONS)
    while interrupted(number := number + 1, work):
        found: list[Any] = []
        after = threading.Thread(target=lambda: found.append(engine.answer(picture(1), "red", options=OPTIONS)), daemon=True)
        after.start()
        after.join(timeout=20)
        assert found, f"an interrupt at call {number} stops all others"
        assert found[0].token_ids == wanted.token_ids
    assert number > 10
