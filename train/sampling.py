"""Which questions a training step asks: balanced over what they are about at first, the natural mix at the end.

In easy-VQA 13 % of the yes/no questions about a colour name the picture's own colour, and 13 % of all questions ask for a
shape. Drawn as they come, a model answers "no" and stays there; `docs/log.md` has the figures.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from .easy_vqa_data import KINDS, Questions

BALANCED = {
    "what color": 0.10,
    "what shape": 0.25,
    "color present": 0.20,
    "color absent": 0.20,
    "shape present": 0.125,
    "shape absent": 0.125,
}


class QuestionSampler:
    """Draws pictures, and questions about each picture.

    Args:
        questions: What to draw from.
        natural_from: Share of the run (0 to 1) at which the mix has become the natural one.
    """

    def __init__(self, questions: Questions, natural_from: float) -> None:
        self._natural_from = natural_from
        self._kinds = questions.kinds()
        self._counts = np.bincount(self._kinds, minlength=len(KINDS))
        order = np.argsort(questions.image_index, kind="stable")
        starts = np.searchsorted(questions.image_index[order], np.arange(len(questions.images) + 1))
        self._rows_of = [order[a:b] for a, b in itertools.pairwise(starts)]
        self._image_index = questions.image_index

    def draw(
        self, rng: np.random.Generator, progress: float, pictures: int, per_picture: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (pictures [I], questions [I * K]); question j belongs to picture j // K."""
        natural = self._counts / self._counts.sum()
        balanced = np.array([BALANCED[kind] for kind in KINDS])
        share = min(1.0, progress / self._natural_from) if self._natural_from else 1.0
        weight = ((1 - share) * balanced + share * natural) / self._counts  # [kinds], of one question of that kind
        weights = weight[self._kinds]  # [Q]
        of_picture = np.bincount(self._image_index, weights, minlength=len(self._rows_of))
        drawn = rng.choice(len(self._rows_of), size=pictures, p=of_picture / of_picture.sum())
        asked = []
        for picture in drawn:
            rows = self._rows_of[picture]
            p = weights[rows] / weights[rows].sum()
            asked.append(rng.choice(rows, size=per_picture, replace=len(rows) < per_picture, p=p))
        return drawn, np.concatenate(asked)
