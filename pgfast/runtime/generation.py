"""What is done with each token of a sequence: ids and logits only, no text and no pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pgfast.types import GenerateOptions

from .sampling import log_softmax, penalise, sample

StopCheck = Callable[[Sequence[int]], bool]
"""Says whether the ids generated so far contain a stop text."""


class Position(Protocol):
    """Where a sequence stands in the decoder, in one place or, if it is several beams, in several."""

    def logits(self, place: int = 0) -> NDArray[np.float32]:
        """Return float32 [V] of the last position."""
        ...

    def rewind(self, depth: int) -> None:
        """Forget all but the prompt and the first `depth` tokens after it."""
        ...

    def copy(self, source: int, target: int, *, whole: bool) -> None:
        """Let one place go on from where another one stands; without `whole` it has the prompt already."""
        ...


class Row(Protocol):
    """One sequence; it decides which token follows."""

    @property
    def width(self) -> int:
        """How many places in the decoder it needs."""
        ...

    @property
    def ahead(self) -> int:
        """How many steps the device may take feeding its most probable token back; 0: the next token comes from here."""
        ...

    def advance(self, token: int, logprob: float, position: Position) -> int | list[int] | None:
        """Take the result of a run.

        Args:
            token: The most probable token (of the first place).
            logprob: Its natural log-probability.
            position: For what those two do not say.

        Returns:
            The token to append next, or one for each place; None: the sequence is complete.
        """
        ...


@dataclass(frozen=True, slots=True)
class Ending:
    """When an answer is complete."""

    max_new_tokens: int
    eos_id: int
    """The end token."""
    stopped: StopCheck | None = None
    """Asked after each token, if there are stop texts."""

    def reason(self, ids: Sequence[int]) -> str | None:
        """Return why these ids are the whole answer, `stop` or `length`, or None."""
        if ids[-1] == self.eos_id or (self.stopped is not None and self.stopped(ids)):
            return "stop"
        return "length" if len(ids) == self.max_new_tokens else None


class Generation:
    """Greedy or sampled tokens, one after the other.

    Args:
        options: Sampling and penalty.
        ending: When it is complete.
        context: Ids in front of the first token, that of the image positions included; the repetition penalty counts them.
    """

    width = 1

    def __init__(self, options: GenerateOptions, ending: Ending, context: Sequence[int] = ()) -> None:
        self.token_ids: list[int] = []
        self.token_logprobs: list[float] = []
        self.finish_reason: str | None = None
        self._options, self._ending, self._context = options, ending, list(context)
        # a generator per row: the same seed gives the same text in any company
        self._rng = np.random.default_rng(options.seed) if options.temperature > 0 else None

    @property
    def ahead(self) -> int:
        """To the limit when greedy (see `Row`); with stop texts only 1, because any token may be the last."""
        if self._rng is not None or self._options.repetition_penalty != 1:
            return 0
        return 1 if self._ending.stopped else self._ending.max_new_tokens - len(self.token_ids)

    def advance(self, token: int, logprob: float, position: Position) -> int | None:
        """Choose and record a token (see `Row`)."""
        o = self._options
        if self._rng is not None or o.repetition_penalty != 1:
            logits = position.logits()
            scores = penalise(logits, [*self._context, *self.token_ids], o.repetition_penalty)
            token = int(scores.argmax())
            if self._rng is not None:
                token = sample(scores, temperature=o.temperature, top_k=o.top_k, top_p=o.top_p, rng=self._rng)
            logprob = float(log_softmax(logits)[token])
        self.token_ids.append(token)
        self.token_logprobs.append(logprob)
        self.finish_reason = self._ending.reason(self.token_ids)
        return token if self.finish_reason is None else None


class ChoiceScores:
    """Exact log-probability of every token of given continuations, with one run of the prompt.

    The choices are a tree of tokens. It is walked depth first, rewinding to the parent of the next node, so what
    choices have in common runs once and all of it in one slot.

    Args:
        choices: Ids of each choice, end token included; no choice is the beginning of another.
    """

    ahead, width = 0, 1

    def __init__(self, choices: Sequence[Sequence[int]]) -> None:
        self.scores: list[list[float]] = [[] for _ in choices]
        """Natural log-probabilities, token by token."""
        self.choices = [tuple(ids) for ids in choices]
        # in sorted order every node comes after its parent and before the next sibling of any ancestor
        self._nodes = sorted({ids[:depth] for ids in self.choices for depth in range(1, len(ids))}, reverse=True)
        self._node: tuple[int, ...] = ()

    def advance(self, token: int, logprob: float, position: Position) -> int | None:
        """Score what may follow this node and go to the next (see `Row`)."""
        logprobs, depth = log_softmax(position.logits()), len(self._node)  # [V]
        for ids, scores in zip(self.choices, self.scores, strict=True):
            if ids[:depth] == self._node:
                scores.append(float(logprobs[ids[depth]]))
        if not self._nodes:
            return None
        self._node = self._nodes.pop()
        position.rewind(len(self._node) - 1)
        return self._node[-1]
