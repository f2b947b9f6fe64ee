"""A data set in memory, and a slice of easy-VQA as one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from pgfast.train.data.records import Record, RowError
from pgfast.train.demo import easy_vqa_data


@dataclasses.dataclass
class Memory:
    """A data set in memory; a row may be a `RowError`."""

    records: list[Record | RowError]
    pictures: dict[str, Any]
    name: str = "memory"

    def __len__(self) -> int:
        return len(self.records)

    def record(self, row: int) -> Record:
        record = self.records[row]
        if isinstance(record, RowError):
            raise record
        return record

    def image(self, row: int) -> Any:
        return self.pictures[self.record(row).picture]


def one(id: int | str, picture: str, text: str, answers: tuple[str, ...] = ("yes",), **more: Any) -> Record:
    return Record(id, picture, text, **({"is_prompt": False, "answer": answers[0] if answers else ""} | more), answers=answers)


def easy_slice() -> Memory:
    """600 questions of the easy-VQA test split: rows of one picture apart from each other, a third of them raw prompts."""
    questions = easy_vqa_data.load("test")
    kinds = questions.kinds()
    rows = np.random.default_rng(0).permutation(len(questions.texts))[:600]
    records: list[Record | RowError] = []
    for number, row in enumerate(rows):
        text, answer = questions.texts[row], questions.answers[row]
        kind = easy_vqa_data.KINDS[kinds[row]]
        is_prompt = number % 3 == 0
        records.append(
            one(
                1000 + number,
                f"{questions.image_index[row]:05}.png",
                f"answer en {text}" if is_prompt else text,
                (answer,) * 10,
                is_prompt=is_prompt,
                answer_type="yes/no" if answer in ("yes", "no") else "other",
                question_type=kind,
            )
        )
    return Memory(records, {f"{i:05}.png": image for i, image in enumerate(questions.images)}, "easy-VQA, a slice")
