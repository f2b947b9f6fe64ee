"""Which questions a step of the demo model asks: part of its pictures are easy-VQA's, part are scenes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..data.records import Record
from .balanced_order import BalancedOrder
from .scene_questions import COUNT

SCENE_SHARE = 0.625
"""Of a step's pictures."""
WEIGHTS = {"caption": 4.0, "detect present": 4.0, "detect absent": 0.6, "count": 0.6}
"""Of a question about a scene, by its kind; others have 1. A scene has one caption and about three detections."""
CROWDED_FROM = (0.0, 0.03, 0.08, 0.14)
"""Share of the run from which scenes of one, two, three and four things are drawn: what it means to say a box comes first."""
DRAW = 9
"""First word of the seeds of these draws."""


class MixedOrder:
    """Draws easy-VQA's questions as `BalancedOrder` does, and scenes by lot.

    Args:
        easy: What draws easy-VQA's part of a step.
        rows: [N] rows of the scenes' questions; those of one scene follow each other.
        records: Their records.
        seed: Decides the draws.
        steps: Of the whole run.
        pictures: Scenes of a step.
        per_picture: Questions about each.
    """

    def __init__(
        self,
        easy: BalancedOrder,
        rows: NDArray[np.int64],
        records: Sequence[Record],
        *,
        seed: int,
        steps: int,
        pictures: int,
        per_picture: int,
    ) -> None:
        self._easy, self._rows, self._seed, self._steps = easy, rows, seed, steps
        self._pictures, self._per_picture = pictures, per_picture
        starts = [0, *(i for i in range(1, len(records)) if records[i].picture != records[i - 1].picture), len(records)]
        self._asked_of = list(itertools.pairwise(starts))
        self._weights = np.array([WEIGHTS.get(record.question_type or "", 1.0) for record in records])
        self._sizes = np.array([_size(records[first:end]) for first, end in self._asked_of])

    def draw(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (rows, epochs, all 0); questions about one picture follow each other."""
        rng = np.random.default_rng([DRAW, self._seed, step])
        asked = []
        most = np.searchsorted(CROWDED_FROM, step / self._steps, side="right")
        for scene in rng.choice(np.flatnonzero(self._sizes <= most), size=self._pictures):
            first, end = self._asked_of[scene]
            weights = self._weights[first:end]
            count = min(self._per_picture, end - first)
            chosen = rng.choice(end - first, size=count, replace=False, p=weights / weights.sum())
            asked.append(self._rows[first + np.resize(chosen, self._per_picture)])
        rows = np.concatenate([self._easy.draw(step)[0], *asked])
        return rows, np.zeros_like(rows)


def _size(asked: Sequence[Record]) -> int:
    """Return how many things a scene has: it is one of the questions about it."""
    return next(int(record.answer) for record in asked if record.text == COUNT)
