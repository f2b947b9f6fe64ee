"""Beam search as a row of the running batch: several beams of one request advance together, each in a place of its own.

Sequences and scores are those of transformers' `generate(num_beams=..., early_stopping=False)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgfast.types import GenerateOptions

from .generation import Ending, Position
from .sampling import log_softmax, penalise


@dataclass(frozen=True, slots=True)
class _Beam:
    """A beginning of an answer."""

    total: float
    """Sum of its tokens' log-probabilities, the repetition penalty applied."""
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural log-probability of each id under the full softmax."""
    parent: int
    """The place that it comes from."""


class BeamSearch:
    """The best answer that a search with a few beams finds; nothing is told before its end.

    A beam is complete at the end token, with a stop text in it, or at the limit. Its score is its total divided by its
    length to the power of `length_penalty`. The search ends when as many beams are complete as there are places and the best
    running one, scored at its present length, is not better than the worst of them.

    Args:
        options: Beams and both penalties.
        ending: When a beam is complete.
        context: As `Generation`'s.
    """

    ahead = 0

    def __init__(self, options: GenerateOptions, ending: Ending, context: Sequence[int] = ()) -> None:
        self.width = options.beams
        self.token_ids: list[int] = []
        self.token_logprobs: list[float] = []
        self.finish_reason: str | None = None
        self.score = float("-inf")
        """Of the answer, when it is there."""
        self._options, self._ending, self._context = options, ending, list(context)
        self._running = {0: _Beam(0.0, (), (), 0)}  # by place
        self._begun = {0}  # places that hold the prompt
        self._complete: list[tuple[float, _Beam, str]] = []  # score and reason; best first

    def advance(self, token: int, logprob: float, position: Position) -> list[int] | None:
        """Choose the next beams (see `Row`): each goes on in its parent's place, or in one whose beam has no children."""
        candidates = self._candidates(position)
        reasons = [self._ending.reason(beam.ids) for beam in candidates]
        divisor = len(candidates[0].ids) ** self._options.length_penalty
        # only the best ones may be complete: the rest is there to go on in their stead
        for beam, reason in list(zip(candidates, reasons, strict=True))[: self.width]:
            if reason is not None:
                self._complete.append((beam.total / divisor, beam, reason))
        self._complete = sorted(self._complete, key=lambda item: -item[0])[: self.width]
        following = [beam for beam, reason in zip(candidates, reasons, strict=True) if reason is None][: self.width]
        full = len(self._complete) == self.width
        if not following or (full and following[0].total / divisor <= self._complete[-1][0]):
            self.score, best, self.finish_reason = self._complete[0]
            self.token_ids, self.token_logprobs = list(best.ids), list(best.logprobs)
            return None
        self._settle(following, position)
        return [self._running[place].ids[-1] if place in self._running else self._ending.eos_id for place in range(self.width)]

    def _candidates(self, position: Position) -> list[_Beam]:
        """Return the best continuations of all beams by one token, twice as many as there are places, best first."""
        most = 2 * self.width  # at most one of each beam's is the end token, so enough remain
        found: list[_Beam] = []
        for place, beam in self._running.items():
            logprobs: NDArray[np.float64] = log_softmax(position.logits(place))  # [V]
            totals = beam.total + penalise(logprobs, [*self._context, *beam.ids], self._options.repetition_penalty)
            best = np.argpartition(-totals, min(most, len(totals)) - 1)[:most]
            found += [
                _Beam(float(totals[id]), (*beam.ids, id), (*beam.logprobs, float(logprobs[id])), place) for id in best.tolist()
            ]
        return sorted(found, key=lambda beam: -beam.total)[:most]

    def _settle(self, beams: list[_Beam], position: Position) -> None:
        """Give each beam a place; what is copied is never read from a place that was written just now."""
        parents = {beam.parent for beam in beams}
        free = [place for place in range(self.width) if place not in parents]
        self._running = {}
        for beam in beams:
            place = beam.parent
            if place in self._running:
                place = free.pop(0)
                position.copy(beam.parent, place, whole=place not in self._begun)
                self._begun.add(place)
            self._running[place] = beam
