"""Which questions a step of the demo model asks: balanced over what they are about at first, the natural mix at the end.

In easy-VQA 13 % of the yes/no questions about a colour name the picture's own colour, and 13 % of all questions ask for a
shape. Drawn as they come, a model answers "no" and stays there; `docs/log.md` has the figures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..data.records import Record
from .easy_vqa_data import KINDS, kind_of

BALANCED = {
    "what color": 0.10,
    "what shape": 0.25,
    "color present": 0.20,
    "color absent": 0.20,
    "shape present": 0.125,
    "shape absent": 0.125,
}
DRAW = 5
"""First word of the seeds of these draws."""


class BalancedOrder:
    """Draws pictures, and questions about each picture.

    Args:
        rows: [N] rows of the dataset to draw from.
        records: Their records.
        seed: Decides the draws.
        steps: Of the whole run.
        natural_from: Share of the run (0 to 1) at which the mix has become the natural one.
        pictures: I, pictures of a step.
        per_picture: K, questions about each.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        records: Sequence[Record],
        *,
        seed: int,
        steps: int,
        natural_from: float,
        pictures: int,
        per_picture: int,
    ) -> None:
        self._rows, self._seed, self._steps, self._natural_from = rows, seed, steps, natural_from
        self._pictures, self._per_picture = pictures, per_picture
        self._kinds = np.array([KINDS.index(kind_of(record.text, record.answer)) for record in records])
        self._counts = np.bincount(self._kinds, minlength=len(KINDS))
        number = {name: i for i, name in enumerate(dict.fromkeys(record.picture for record in records))}
        self._picture_of = np.array([number[record.picture] for record in records])
        order = np.argsort(self._picture_of, kind="stable")
        starts = np.searchsorted(self._picture_of[order], np.arange(len(number) + 1))
        self._asked_of = [order[a:b] for a, b in itertools.pairwise(starts)]

    def draw(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (rows [I * K], epochs, all 0); questions about one picture follow each other."""
        rng = np.random.default_rng([DRAW, self._seed, step])
        natural = self._counts / self._counts.sum()
        balanced = np.array([BALANCED[kind] for kind in KINDS])
        share = min(1.0, step / self._steps / self._natural_from) if self._natural_from else 1.0
        # [kinds], of one question of that kind; a kind that the data does not have has no question to draw
        weight = ((1 - share) * balanced + share * natural) / np.maximum(self._counts, 1)
        weights = weight[self._kinds]  # [N]
        of_picture = np.bincount(self._picture_of, weights, minlength=len(self._asked_of))
        asked = []
        for picture in rng.choice(len(self._asked_of), size=self._pictures, p=of_picture / of_picture.sum()):
            among = self._asked_of[picture]
            p = weights[among] / weights[among].sum()
            asked.append(rng.choice(among, size=self._per_picture, replace=len(among) < self._per_picture, p=p))
        rows = self._rows[np.concatenate(asked)]
        return rows, np.zeros_like(rows)
