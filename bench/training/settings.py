"""What one measurement is: the variants, what a child process is told, and the rows that both sides see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PUBLIC, OURS, CACHED, FILLING = "transformers", "pgfast", "pgfast, features cached", "pgfast, filling the cache"
VARIANTS = (PUBLIC, OURS, CACHED)
"""Take turns in every round; the cache is filled once before."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One run in a process of its own."""

    variant: str
    checkpoint: str
    data: str
    out: str
    cache: str
    """Folder of cached features; empty for none."""
    threads: int
    batch_size: int
    accumulation: int
    warmup: int
    """Steps that are not counted."""
    counted: int
    seed: int = 42

    @property
    def steps(self) -> int:
        """Of the schedule; the last one is not run.

        pgfast prepares data a step ahead, and the last step that counts must have a next one too.
        """
        return self.warmup + self.counted + 1


def order(spec: Spec, rows: int) -> list[int]:
    """Return the rows of a whole run in pgfast's order, so that both sides see the same batches."""
    from pgfast.train.order import EpochOrder

    drawn = EpochOrder(np.arange(rows), spec.seed, spec.batch_size * spec.accumulation)
    return [int(row) for step in range(spec.steps) for row in drawn.draw(step)[0]]
