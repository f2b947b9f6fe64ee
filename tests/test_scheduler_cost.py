"""What the scheduler itself takes between two steps."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from fake_decoder import fake_features

from pgfast import GenerateOptions
from pgfast.runtime.decoder import Chosen
from pgfast.runtime.generation import Ending, Generation
from pgfast.runtime.scheduler import Scheduler


def test_the_scheduler_costs_little(capsys: pytest.CaptureFixture[str]) -> None:
    """Under 2 % of a 70 ms step with 16 rows, in the process that pytest shares with a busy machine."""

    class Instant:
        slots = 16
        spent = 0.0

        def _chosen(self, rows: int) -> Any:
            return Chosen(np.full((1, rows), 7, np.int64), np.zeros((1, rows), np.float32))

        def prompt(self, features: Any, prompts: Any, first: int = 0) -> Any:
            return self._chosen(len(prompts))

        def step(self, rows: int, tokens: Any = None, burst: int = 1) -> Any:
            begun = time.perf_counter()
            chosen = self._chosen(rows)
            self.spent += time.perf_counter() - begun
            return chosen

        def release(self, row: int) -> None:
            pass

    steps, figures = 2000, []
    for rows in (1, 16):
        decoder = Instant()
        scheduler = Scheduler(decoder)  # type: ignore[arg-type]
        tickets = [
            scheduler.submit(Generation(GenerateOptions(), Ending(steps, eos_id=-1)), fake_features(0), [1])
            for _ in range(rows)
        ]
        for ticket in tickets:
            ticket.wait()
        seconds = tickets[-1].ended - tickets[-1].first_token - decoder.spent
        scheduler.close()
        figures.append(seconds / steps * 1e6)
    with capsys.disabled():
        print(f"\nscheduler: {figures[0]:.0f} us per step with 1 row, {figures[1]:.0f} us with 16")
    assert max(figures) < 0.02 * 70_000
