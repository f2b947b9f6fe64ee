"""Which questions a step of the demo model asks: part of its pictures are easy-VQA's, part are scenes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..data.records import Record
from .balanced_order import BalancedOrder

SCENE_SHARE = 0.625
"""Of a step's pictures."""
WEIGHTS = {"caption": 4.0, "detect present": 3.0, "detect absent": 0.6, "count": 0.7}
"""Of a question about a scene, by its kind; others have 0.5. A scene has one caption and about three detections."""
DRAW = 9
"""First word of the seeds of these draws."""


class MixedOrder:
    """Draws easy-VQA's questions as `BalancedOrder` does, and scenes by lot.

    Args:
        easy: What draws easy-VQA's part of a step.
        rows: [N] rows of the scenes' questions; those of one scene follow each other.
        records: Their records.
        seed: Decides the draws.
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
        pictures: int,
        per_picture: int,
    ) -> None:
        self._easy, self._rows, self._seed = easy, rows, seed
        self._pictures, self._per_picture = pictures, per_picture
        starts = [0, *(i for i in range(1, len(records)) if records[i].picture != records[i - 1].picture), len(records)]
        self._asked_of = list(itertools.pairwise(starts))
        self._weights = np.array([WEIGHTS.get(record.question_type or "", 0.5) for record in records])

    def draw(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (rows, epochs, all 0); questions about one picture follow each other."""
        rng = np.random.default_rng([DRAW, self._seed, step])
        asked = []
        for scene in rng.choice(len(self._asked_of), size=self._pictures, replace=False):
            first, end = self._asked_of[scene]
            weights = self._weights[first:end]
            count = min(self._per_picture, end - first)
            chosen = rng.choice(end - first, size=count, replace=False, p=weights / weights.sum())
            asked.append(self._rows[first + np.resize(chosen, self._per_picture)])
        rows = np.concatenate([self._easy.draw(step)[0], *asked])
        return rows, np.zeros_like(rows)
