"""Accuracy of many answers: overall, and per type of answer and of question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from pgfast.metrics import Mode, vqa_accuracy

from ..data.records import Record


@dataclass(frozen=True, slots=True)
class Group:
    """The mean over some questions."""

    accuracy: float
    """0 to 1."""
    count: int


@dataclass(frozen=True, slots=True)
class Score:
    """How right the answers to a data set are."""

    mode: Mode
    overall: Group | None
    """None: no question has a reference answer."""
    by_answer_type: dict[str, Group]
    """Most frequent first; questions that name no type are in `overall` alone."""
    by_question_type: dict[str, Group]
    unscored: int
    """Questions without a reference answer, as in a test split."""


def accuracy_of(record: Record, prediction: str, mode: Mode) -> float | None:
    """Score one answer, 0 to 1; None without a reference."""
    return vqa_accuracy(prediction, record.answers, mode) if record.answers else None


def score(answers: Iterable[tuple[Record, str]], mode: Mode = "official") -> Score:
    """Score the answers of a data set.

    Args:
        answers: Each question with what the model answered.
        mode: As `pgfast.metrics.vqa_accuracy` has it.

    Raises:
        InputError: No such mode.
    """
    everything: list[float] = []
    by_answer_type, by_question_type = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    unscored = 0
    for record, prediction in answers:
        accuracy = accuracy_of(record, prediction, mode)
        if accuracy is None:
            unscored += 1
            continue
        everything.append(accuracy)
        if record.answer_type is not None:
            by_answer_type[record.answer_type].append(accuracy)
        if record.question_type is not None:
            by_question_type[record.question_type].append(accuracy)
    overall = _group(everything) if everything else None
    return Score(mode, overall, _groups(by_answer_type), _groups(by_question_type), unscored)


def _group(accuracies: list[float]) -> Group:
    return Group(sum(accuracies) / len(accuracies), len(accuracies))


def _groups(by_type: dict[str, list[float]]) -> dict[str, Group]:
    ordered = sorted(by_type.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name: _group(accuracies) for name, accuracies in ordered}
