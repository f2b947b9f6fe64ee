"""Which rows a step sees. Everything follows from (seed, step), so the step number is the whole cursor of a resumed run."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

HOLDOUT, LIMIT, EPOCH, ANSWERS = range(4)
"""First words of the seeds of independent draws."""


class RowOrder(Protocol):
    """Rows by step."""

    def draw(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (rows [G], epoch of each row [G]) of a step over all processes and passes."""


class EpochOrder:
    """Every row once per epoch, each epoch in its own order; the epochs follow one another without a gap.

    Args:
        rows: [N] rows of the dataset to draw from.
        seed: Decides the order.
        per_step: G, rows of one optimizer step.
    """

    def __init__(self, rows: NDArray[np.int64], seed: int, per_step: int) -> None:
        self._rows, self._seed, self._per_step = rows, seed, per_step
        self._shuffled: dict[int, NDArray[np.int64]] = {}

    def draw(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (rows [G], epochs [G])."""
        place = np.arange(step * self._per_step, (step + 1) * self._per_step)
        epochs, within = np.divmod(place, len(self._rows))
        rows = np.array([self._epoch(int(epoch))[at] for epoch, at in zip(epochs, within, strict=True)])
        return rows, epochs

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._shuffled:
            # a step may lie in two epochs; older ones are not needed again
            self._shuffled = {e: order for e, order in self._shuffled.items() if e == epoch - 1}
            self._shuffled[epoch] = np.random.default_rng([EPOCH, self._seed, epoch]).permutation(self._rows)
        return self._shuffled[epoch]


def total_steps(rows: int, epochs: float, per_step: int, max_steps: int) -> int:
    """Steps of a run; the rows that do not fill a last step are left out."""
    return max_steps or max(1, int(rows * epochs) // per_step)


def some_rows(rows: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.int64]:
    """Draw `limit` of the rows, in their old order; 0: all of them."""
    if not limit or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng([LIMIT, seed]).permutation(rows)[:limit])


def hold_out(pictures: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """Choose held-out rows by picture, so that no held-out picture is seen in training.

    Args:
        pictures: [N], number of each row's picture, 0 to P - 1.
        share: Of the pictures, 0 to 1.
        seed: Decides which.

    Returns:
        [N] bool, True where a row is held out.
    """
    count = int(pictures.max()) + 1 if len(pictures) else 0
    held = np.zeros(count, dtype=bool)
    held[np.random.default_rng([HOLDOUT, seed]).permutation(count)[: round(share * count)]] = True
    return held[pictures]


def answer_of(answers: tuple[str, ...], epoch: int, row: int, seed: int) -> str:
    """Walk through a row's answers without replacement, epoch by epoch (big_vision: choice_no_replacement)."""
    order = np.random.default_rng([ANSWERS, seed, row, epoch // len(answers)]).permutation(len(answers))
    return answers[order[epoch % len(answers)]]
