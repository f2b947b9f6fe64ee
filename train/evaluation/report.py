"""An evaluation as a folder: results for EvalAI, every question, a summary, and the worst errors as a page."""

from __future__ import annotations

import base64
import dataclasses
import heapq
import html
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgfast.errors import ImageError, InputError
from pgfast.image import ImageInput, open_image

from ..data.records import Dataset, Record, RowError
from .calibration import ConfidenceReport, Outcome
from .predictions import Answers, Prediction
from .scores import Group, Score, accuracy_of

THUMBNAIL = 256
"""Longest side of a picture on the page, in pixels."""
NAMED = 100
"""Skipped rows that the summary names; all are counted."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model's answers to a data set, and what there is to say about them."""

    dataset: Dataset
    answers: Answers
    score: Score
    model: dict[str, Any]
    """What answered: a bundle with its digest, or a checkpoint; where it ran; versions."""
    seconds: float
    confidence: ConfidenceReport | None = None
    """What the answers' confidence is worth; None: nothing was scored."""

    def outcomes(self) -> list[Outcome]:
        """Confidence and accuracy of all answers that have both."""
        scored = ((record.picture, p.confidence, accuracy_of(record, p.text, self.score.mode)) for record, _, p in self.rows())
        return [Outcome(picture, c, a) for picture, c, a in scored if c is not None and a is not None]

    def rows(self) -> Iterator[tuple[Record, int, Prediction]]:
        """Every question with its row and its answer, in the data's order."""
        for row, prediction in self.answers.predictions.items():
            yield self.dataset.record(row), row, prediction

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        skipped = self.answers.skipped
        return {
            "mode": self.score.mode,
            "overall": _figures(self.score.overall),
            "answer_types": {name: _figures(group) for name, group in self.score.by_answer_type.items()},
            "question_types": {name: _figures(group) for name, group in self.score.by_question_type.items()},
            "confidence": dataclasses.asdict(self.confidence) if self.confidence is not None else None,
            "questions": len(self.answers.predictions),
            "unscored": self.score.unscored,
            "skipped": len(skipped),
            "skipped_rows": [{"row": row, "reason": skipped[row]} for row in list(skipped)[:NAMED]],
            "data": self.dataset.name,
            "data_rows": len(self.dataset),
            "model": self.model,
            "seconds": round(self.seconds, 1),
        }


def _figures(group: Group | None) -> dict[str, Any] | None:
    return dataclasses.asdict(group) if group is not None else None


def check_folder(out: Path) -> None:
    """Refuse a folder that holds something, before hours of answering.

    Raises:
        InputError: It is not empty, or not a folder.
    """
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists: choose another folder for the evaluation, or remove it")
    except OSError as error:
        raise InputError(f"{out} cannot be read: {error.strerror}") from error


def write_report(evaluation: Evaluation, out: Path, *, worst: int = 100) -> None:
    """Write results.json, questions.jsonl, summary.json and errors.html into a new folder.

    Args:
        evaluation: What to write.
        out: The folder; it gets its name only when everything is written.
        worst: How many errors the page shows.

    Raises:
        InputError: The folder exists, or cannot be written.
    """
    check_folder(out)
    with _appears_whole(out) as partial:
        _write_results(evaluation, partial / "results.json")
        _write_questions(evaluation, partial / "questions.jsonl")
        summary = json.dumps(evaluation.summary(), indent=2, ensure_ascii=False)
        (partial / "summary.json").write_text(summary + "\n", encoding="utf-8")
        _write_page(evaluation, partial / "errors.html", worst)


@contextmanager
def _appears_whole(out: Path) -> Iterator[Path]:
    private = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # private until it is whole; the folder inside has the rights of any new folder
        private = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        partial = private / out.name
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.rename(out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        if private is not None:
            shutil.rmtree(private, ignore_errors=True)


def _write_results(evaluation: Evaluation, path: Path) -> None:
    """The format of EvalAI: one list; a row a line, so that nothing holds the whole text."""
    with path.open("w", encoding="utf-8") as file:
        separator = "[\n"
        for record, _, prediction in evaluation.rows():
            file.write(separator + json.dumps({"question_id": record.id, "answer": prediction.text}, ensure_ascii=False))
            separator = ",\n"
        file.write("\n]\n" if separator == ",\n" else "[]\n")


def _write_questions(evaluation: Evaluation, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record, row, prediction in evaluation.rows():
            line = {
                "id": record.id,
                "picture": record.picture,
                "question": record.text,
                "prediction": prediction.text,
                "answers": list(record.answers),
                "accuracy": accuracy_of(record, prediction.text, evaluation.score.mode),
                "confidence": prediction.confidence,
                "answer_type": record.answer_type,
                "question_type": record.question_type,
            }
            if row in evaluation.answers.skipped:
                line["skipped"] = evaluation.answers.skipped[row]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


@dataclass(frozen=True, slots=True)
class WrongAnswer:
    """An answer that costs accuracy."""

    record: Record
    row: int
    prediction: Prediction
    accuracy: float


def worst_errors(evaluation: Evaluation, count: int) -> list[WrongAnswer]:
    """The errors that a sure model made: by confidence times what is missing to full accuracy; skipped rows left out."""
    wrong = (
        WrongAnswer(record, row, prediction, accuracy)
        for record, row, prediction in evaluation.rows()
        if prediction.confidence is not None
        and (accuracy := accuracy_of(record, prediction.text, evaluation.score.mode)) is not None
        and accuracy < 1
    )
    return heapq.nlargest(count, wrong, key=lambda error: (error.prediction.confidence or 0) * (1 - error.accuracy))


# light and dark by the reader's own setting; nothing is loaded from anywhere
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<title>Worst errors</title><style>
:root{color-scheme:light dark;--line:#ddd;--soft:#666}
@media (prefers-color-scheme:dark){:root{--line:#444;--soft:#aaa}}
body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;background:Canvas;color:CanvasText}
article{display:flex;gap:1em;border-top:1px solid var(--line);padding:1em 0}
figure{flex:0 0 256px;margin:0;text-align:center}img{max-width:100%}figure,dt{color:var(--soft)}
h2{font-size:1.1em;margin:0 0 .4em}dl{display:grid;grid-template-columns:6em 1fr;margin:0}dd{margin:0}
h2,dd{overflow-wrap:anywhere;white-space:pre-wrap}@media (max-width:40em){article{flex-direction:column}}
</style></head><body>
"""


def _write_page(evaluation: Evaluation, path: Path, worst: int) -> None:
    overall = evaluation.score.overall
    errors = worst_errors(evaluation, worst)
    accuracy = f"{100 * overall.accuracy:.2f} on {overall.count:,} questions" if overall else "unknown: no reference answers"
    intro = (
        f"{evaluation.dataset.name}: accuracy {accuracy} ({evaluation.score.mode}). "
        f"{len(errors)} answers that are wrong, those the model was surest of first."
    )
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{_HEAD}<h1>Worst errors</h1><p>{html.escape(intro)}</p>\n")
        for error in errors:
            file.write(_article(error, _picture(evaluation.dataset, error.row)) + "\n")
        file.write("</body></html>\n")


def _article(error: WrongAnswer, picture: str) -> str:
    counts = {answer: error.record.answers.count(answer) for answer in error.record.answers}
    facts = {
        "answer": error.prediction.text or "(nothing)",
        "references": ", ".join(f"{answer} ({count} times)" if count > 1 else answer for answer, count in counts.items()),
        "accuracy": f"{100 * error.accuracy:.2f}",
        "confidence": f"{100 * (error.prediction.confidence or 0):.1f}%",
        "id": f"{error.record.id}, {error.record.picture}",
    }
    lines = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items())
    question = html.escape(error.record.text)
    return f"<article><figure>{picture}</figure><div><h2>{question}</h2><dl>{lines}</dl></div></article>"


def _picture(dataset: Dataset, row: int) -> str:
    """A small JPEG inside the page, or a line that says why not: the picture may be gone by now."""
    try:
        return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(_thumbnail(dataset.image(row))).decode()}">'
    except (ImageError, RowError) as error:
        return html.escape(str(error))


def _thumbnail(image: ImageInput) -> bytes:
    small, buffer = open_image(image).copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
