"""How many prompts come between two steps: as many as fit into the time that the others can spare."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from fake_decoder import FakeDecoder, fake_features

from pgfast import GenerateOptions
from pgfast.runtime import scheduler as scheduler_module
from pgfast.runtime.generation import Ending, Generation
from pgfast.runtime.scheduler import Scheduler

SIX = GenerateOptions(max_new_tokens=6)


class TimedDecoder(FakeDecoder):
    """Its prompts take so many seconds each, on a clock of its own; the first run waits for `go`."""

    def __init__(self, slots: int, prompt_seconds: float) -> None:
        super().__init__(slots)
        self.now, self._prompt_seconds = 0.0, prompt_seconds
        self.go = threading.Event()
        self.before_run = lambda number: self._hold(number)

    def _hold(self, number: int) -> None:
        if number == 0:
            assert self.go.wait(20)

    def perf_counter(self) -> float:
        return self.now

    def prompt(self, image_features: Any, prompts: list[list[int]], first: int = 0) -> Any:
        chosen = super().prompt(image_features, prompts, first)
        self.now += self._prompt_seconds * len(prompts)
        return chosen


def runs(monkeypatch: pytest.MonkeyPatch, prompt_seconds: float, stall: float) -> list[int]:
    """Ten endless questions come while the first prompt runs; return the rows of each run, negative for prompts."""
    decoder = TimedDecoder(16, prompt_seconds)
    monkeypatch.setattr(scheduler_module, "time", decoder)
    scheduler = Scheduler(decoder, together=4, stall=stall)
    seen: list[int] = []
    scheduler.on_step = seen.append
    tickets = [scheduler.submit(Generation(SIX, Ending(6, eos_id=-1)), fake_features(0), [2 + i]) for i in range(10)]
    decoder.go.set()
    for ticket in tickets:
        ticket.wait(20)
    scheduler.close()
    assert len(seen) == len(decoder.runs)
    return [-rows if run[0] == "prompt" else rows for rows, run in zip(seen, decoder.runs, strict=True)]


def test_quick_prompts_share_runs_and_come_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # 10 ms each: one alone, because nothing is known yet, then 4 in a run; 50 ms are over then
    assert runs(monkeypatch, 0.01, 0.05)[:6] == [-1, -4, 5, -4, -1, 10]


def test_slow_prompts_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs(monkeypatch, 1.0, 0.05)[:6] == [-1, 1, -1, 2, -1, 3]


def test_two_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    # 20 ms each: the second fits into 50 ms behind the first, then two share a run
    assert runs(monkeypatch, 0.02, 0.05)[:5] == [-1, -2, 3, -2, 5]
