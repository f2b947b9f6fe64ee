"""A row of the input: which picture, which question; and its result, which becomes a line of the output."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import os
import stat
from dataclasses import dataclass
from typing import Any

from pgfast.errors import ImageError, InputError, PromptError
from pgfast.types import Answer

KEYS = ("image", "question", "prompt", "id", "choices", "language")
"""What is read of a row; other keys are passed over."""
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")
"""How JPEG, PNG, WebP and GIF begin in base64."""


class RowError(InputError):
    """A row that is not what it should be."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a row has no answer."""

    code: str
    """row_error, image_error, prompt_error or input_error."""
    message: str

    @classmethod
    def of(cls, error: InputError) -> Failure:
        """Describe what was raised."""
        codes = ((RowError, "row_error"), (ImageError, "image_error"), (PromptError, "prompt_error"))
        return cls(next((code for kind, code in codes if isinstance(error, kind)), "input_error"), str(error))


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a row gets that says nothing itself."""

    question: str | None = None
    prompt: str | None = None
    """At most one of the two."""
    language: str = "en"


@dataclass(frozen=True, slots=True)
class Survey:
    """What one quick look at the whole input says."""

    sha256: str | None
    """Of the file's bytes, or of the names and sizes in a folder; None for stdin."""
    rows: int | None
    """How many there are; about, where lines are blank or cells hold line ends."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question about one picture."""

    number: int
    """From 0, in the order of the input."""
    id: str | int | None = None
    image: str | None = None
    """The picture's path as it was given; None for one that is inside the row."""
    picture: str = ""
    """The path to open; or the picture itself, as base64 or data URI, when `embedded`."""
    embedded: bool = False
    question: str | None = None
    prompt: str | None = None
    """Raw, no template is put around it; there is a question or a prompt."""
    choices: tuple[str, ...] | None = None
    language: str = "en"
    error: Failure | None = None
    """The row cannot be used."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a row: an answer or an error."""

    row: Row
    answer: Answer | None = None
    error: Failure | None = None

    def record(self, *, timings: bool = False) -> dict[str, Any]:
        """Return the keys and values of a line of the output; every line has the same keys.

        Args:
            timings: With the seconds of `Answer.timings`, which no two runs have in common.
        """
        row, answer = self.row, self.answer
        return {
            "row": row.number,
            "id": row.id,
            "image": row.image,
            "question": row.question,
            "prompt": row.prompt,
            "text": answer and answer.text,
            "confidence": answer and answer.confidence,
            "finish_reason": answer and answer.finish_reason,
            "choices": answer and answer.choices,
            "calibrated": answer and answer.calibrated,
            "unsure_of": answer and answer.unsure_of,
            **({"timings": answer and dataclasses.asdict(answer.timings)} if timings else {}),
            "error": self.error and dataclasses.asdict(self.error),
        }


def to_row(number: int, fields: Any, folder: str, defaults: Defaults) -> Row:
    """Check what a row says; what is wrong with it becomes its `error`.

    Args:
        number: `Row.number`.
        fields: A dict with `image`, `question` or `prompt`, and perhaps `id`, `choices` (a list) and `language`.
        folder: What a path is relative to.
        defaults: For what is not there.
    """
    row: dict[str, Any] = {"number": number}  # grows step by step: an error row still says which one it is
    try:
        if not isinstance(fields, dict):
            raise RowError("the row is not an object with image and question")
        row["id"] = _id(fields.get("id"))
        row |= _picture(_text(fields, "image"), folder)
        question, prompt = _text(fields, "question"), _text(fields, "prompt")
        if question is None and prompt is None:
            question, prompt = defaults.question, defaults.prompt
        row |= {"question": question, "prompt": prompt}
        if question is None and prompt is None:
            raise RowError("the row has neither question nor prompt")
        if question is not None and prompt is not None:
            raise RowError("the row has both question and prompt: one of them is needed")
        language = _text(fields, "language")
        row["language"] = defaults.language if language is None else language
        row["choices"] = _choices(fields.get("choices"))
    except RowError as error:
        row["error"] = Failure.of(error)
    return Row(**row)


def picture_of(row: Row) -> str | bytes:
    """Return what the engine takes as the row's picture: a path, or the bytes of a file.

    Raises:
        ImageError: It is no file, or not base64.
    """
    if not row.embedded:
        try:
            regular = stat.S_ISREG(os.stat(row.picture).st_mode)
        except (OSError, ValueError):  # the engine says what is wrong
            return row.picture
        if not regular and not os.path.isdir(row.picture):  # a pipe, for example, would be waited for
            raise ImageError(f"{row.picture} is not a file")
        return row.picture
    head, comma, data = row.picture.partition(",") if row.picture.startswith("data:") else ("", ",", row.picture)
    if not comma or (head and not head.endswith(";base64")):
        raise ImageError("the data URI is not base64: it should begin like data:image/png;base64,")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the picture in the row is not base64: {error}") from error


def failed(row: Row, error: InputError) -> Row:
    """Return the row with the reason why it cannot be used."""
    return dataclasses.replace(row, error=Failure.of(error))


def _picture(image: str | None, folder: str) -> dict[str, Any]:
    if not image:
        raise RowError("the row has no image")
    # a path with a dot, as in .jpg, is never base64
    if image.startswith("data:") or (image.startswith(_BASE64_STARTS) and len(image) >= 64 and "." not in image):
        return {"picture": image, "embedded": True}
    return {"image": image, "picture": os.path.join(folder, image)}


def _text(fields: dict[Any, Any], key: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{key} is not a text")
    return value


def _id(value: Any) -> str | int | None:
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise RowError("id is neither a text nor a whole number")
    return value


def _choices(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise RowError("choices is not a list of texts")
    return tuple(value)
