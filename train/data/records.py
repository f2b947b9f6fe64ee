"""What every data format becomes: rows of a picture, a text and its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pgfast.image import ImageInput


@dataclass(frozen=True, slots=True)
class Record:
    """One question about one picture."""

    id: int | str
    """The data's own `question_id`, or the row's number from 0."""
    picture: str
    """Which picture: a path or a name; rows with the same one share it."""
    text: str
    """The question."""
    is_prompt: bool
    """The text is the whole prompt (`prefix` of a JSONL row): no template is put around it."""
    answers: tuple[str, ...]
    """All reference answers in the data's order: ten in VQAv2, often one elsewhere, none in a test split."""
    answer: str
    """The one to train on: `multiple_choice_answer`, `suffix`, or the most frequent of `answers` (the first on a tie)."""
    answer_type: str | None = None
    """VQAv2: yes/no, number or other."""
    question_type: str | None = None


class Dataset(Protocol):
    """Rows by number. Reading a record never opens its picture."""

    @property
    def name(self) -> str:
        """What a report calls it."""

    def __len__(self) -> int: ...

    def record(self, row: int) -> Record:
        """Return a row.

        Raises:
            RowError: The row cannot be used.
        """

    def image(self, row: int) -> ImageInput:
        """Return the row's picture for `pgfast.image.open_image`: a path, bytes, or an array; if possible not decoded."""


class RowError(ValueError):
    """A row that cannot be used; the message is the reason, without the row's name."""
