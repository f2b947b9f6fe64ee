"""The demo model's data: easy-VQA and generated scenes, with captions, boxes and counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..demo.scene_questions import Asked, questions
from ..demo.scenes import make_scene
from .easy_vqa import EasyVqaDataset
from .records import Record

SCENES, SEED = 20_000, 0
"""How many scenes, and the seed of their set; evaluation draws from other seeds."""
QUESTIONS = 8
"""First word of the seeds of what is asked about a scene."""


class DemoDataset:
    """easy-VQA's training split, then scenes.

    Raises:
        MissingDependencyError: `easy-vqa` is not installed.
    """

    name = "demo:train"

    def __init__(self, scenes: int = SCENES) -> None:
        self.easy = EasyVqaDataset("train")
        texts = sorted({self.easy.record(row).text for row in range(len(self.easy))})
        self._asked: list[tuple[int, Asked]] = []
        for number in range(scenes):
            things = make_scene(SEED, number).things
            asked = questions(things, texts, np.random.default_rng([QUESTIONS, SEED, number]))
            self._asked += [(number, one) for one in asked]

    def __len__(self) -> int:
        return len(self.easy) + len(self._asked)

    def record(self, row: int) -> Record:
        """Return a row; see `Dataset.record`."""
        if row < len(self.easy):
            return self.easy.record(row)
        number, asked = self._asked[row - len(self.easy)]
        kind = "yes/no" if asked.answer in ("yes", "no") else asked.kind
        picture = f"scene/{number}"
        return Record(row, picture, asked.text, asked.is_prompt, (asked.answer,), asked.answer, kind, asked.kind)

    def image(self, row: int) -> NDArray[np.uint8]:
        """Return the picture, uint8 [64, 64, 3]."""
        if row < len(self.easy):
            return self.easy.image(row)
        return make_scene(SEED, self._asked[row - len(self.easy)][0]).draw()
