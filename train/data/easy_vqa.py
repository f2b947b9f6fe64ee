"""easy-VQA, from its installed package."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..demo.easy_vqa_data import kind_of, load
from .records import Record
from .rows import to_record


class EasyVqaDataset:
    """A split of easy-VQA.

    Args:
        split: `train` (38,575 questions about 4,000 pictures) or `test` (9,673 about 1,000).

    Raises:
        MissingDependencyError: `easy-vqa` is not installed.
    """

    def __init__(self, split: Literal["train", "test"]) -> None:
        self._split, self._questions = split, load(split)

    @property
    def name(self) -> str:
        """`easy-vqa:train` or `easy-vqa:test`."""
        return f"easy-vqa:{self._split}"

    def __len__(self) -> int:
        return len(self._questions.texts)

    def record(self, row: int) -> Record:
        """Return a row; see `Dataset.record`."""
        question, answer = self._questions.texts[row], self._questions.answers[row]
        fields = {
            "question": question,
            "answer": answer,
            "answer_type": "yes/no" if answer in ("yes", "no") else "other",
            "question_type": kind_of(question, answer),
        }
        return to_record(fields, row, f"easy-vqa/{self._split}/{self._questions.image_index[row]}")

    def image(self, row: int) -> NDArray[np.uint8]:
        """Return the picture, uint8 [64, 64, 3]."""
        picture: NDArray[np.uint8] = self._questions.images[self._questions.image_index[row]]
        return picture
