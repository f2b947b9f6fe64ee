"""What models answered."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.records import Record

Asked = tuple[int, Record]
"""A question with its row."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model answered."""

    text: str
    confidence: float | None
    """Probability of exactly this text; None where the row was skipped."""


@dataclass(slots=True)
class Answers:
    """Predictions for a data set."""

    predictions: dict[int, Prediction] = field(default_factory=dict)
    """By row, in the data's order; a skipped row has an empty text, one that cannot even be read has no entry."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Row and reason."""
