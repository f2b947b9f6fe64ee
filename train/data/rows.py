"""The fields of a row, whatever file they came from, to a `Record`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgfast.errors import InputError

from .records import Record, RowError

FIELDS = (
    "question",
    "prefix",
    "multiple_choice_answer",
    "suffix",
    "answer",
    "answers",
    "question_id",
    "answer_type",
    "question_type",
)
"""What is read of a row besides its picture; other keys are ignored, and so are those that are null."""


def to_record(fields: Mapping[str, Any], row: int, picture: str) -> Record:
    """Check a row's fields.

    Args:
        fields: `question` or `prefix`, and any other of `FIELDS`.
        row: The row's number, its id where the data gives none.
        picture: `Record.picture`.

    Raises:
        RowError: A field is missing, empty or of a wrong type. What stands before the first colon is the same for all rows
            with this fault.
    """
    question, prefix = (_text(key, fields.get(key)) for key in ("question", "prefix"))
    if (question is None) == (prefix is None):
        raise RowError(f"{'neither' if question is None else 'both'} of question and prefix is there")
    text = question.strip() if question is not None else prefix  # a prompt is used as it is, white space too
    if text is None or not text.strip():
        raise RowError("the question is empty")
    answers = _answers(fields.get("answers"))
    given = (_text(key, fields.get(key)) for key in ("multiple_choice_answer", "suffix", "answer"))
    answer = next((value.strip() for value in given if value is not None), None)
    if answer is None and answers:
        counts = Counter(value for value in answers if value)
        answer = counts.most_common(1)[0][0] if counts else ""  # ties: in the order of first appearance
    if answer == "":
        raise RowError("the answer is empty")
    return Record(
        id=_id(fields.get("question_id"), row),
        picture=picture,
        text=text,
        is_prompt=prefix is not None,
        answers=answers or ((answer,) if answer is not None else ()),
        answer=answer or "",
        answer_type=_text("answer_type", fields.get("answer_type")),
        question_type=_text("question_type", fields.get("question_type")),
    )


def picture_folder(folder: Path, pictures: str) -> str:
    """Return the absolute path of a folder of pictures.

    Args:
        folder: The folder.
        pictures: What should be in it, for the message.

    Raises:
        InputError: It is no folder.
    """
    path = os.path.abspath(folder)
    if not os.path.isdir(path):
        raise InputError(f"{path} is not a folder: give the folder with {pictures}")
    return path


def picture_path(folder: str, name: Any) -> str:
    """Return the path of a picture that a data file names; data come from strangers, so it stays inside the folder.

    Args:
        folder: Absolute path of the folder of pictures.
        name: What the row says: a path in that folder. Symbolic links are followed wherever they lead.

    Raises:
        RowError: Not a path, or one that leaves the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise RowError(f"image is not a path: {_short(name)}")
    path = os.path.normpath(os.path.join(folder, name))
    if not path.startswith(os.path.join(folder, "")):
        raise RowError(f"the picture's path leaves the folder of pictures: {_short(name)}")
    return path


def _text(key: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise RowError(f"{key} is not text: {_short(value)}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):  # JSON can write it, UTF-8 cannot
        raise RowError(f"{key} holds half a character")
    return value


def _answers(value: Any) -> tuple[str, ...]:
    """Read strings, or VQAv2's objects; an annotator may have written nothing, and the official score counts all ten."""
    if isinstance(value, Mapping):  # `datasets` turns a list of objects into an object of lists
        value = value.get("answer")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RowError(f"answers is not a list: {_short(value)}")
    texts = (_text("answers", item.get("answer") if isinstance(item, Mapping) else item) for item in value)
    return tuple((text or "").strip() for text in texts)


def _id(value: Any, row: int) -> int | str:
    if value is None:
        return row
    if isinstance(value, int | str) and not isinstance(value, bool):
        return value
    raise RowError(f"question_id is neither a whole number nor text: {_short(value)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
