"""A question between being asked and being answered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pgfast.calibration import UNSURE, calibrate
from pgfast.manifest import Calibration
from pgfast.prompt import Tokenizer, cut_at_stop, safe_length
from pgfast.runtime.beam_search import BeamSearch
from pgfast.runtime.generation import ChoiceScores, Generation
from pgfast.runtime.ticket import Ticket
from pgfast.token_texts import TokenTexts
from pgfast.types import Answer, GenerateOptions, Timings


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A question that the engine works on; made by `Engine.submit`."""

    _row: Generation | BeamSearch | ChoiceScores
    _ticket: Ticket
    _tokenizer: Tokenizer
    _options: GenerateOptions
    _choices: Sequence[str] | None
    _start: float
    """`time.perf_counter` when its picture was taken up."""
    _preprocess: float
    _vision: float
    _calibration: Calibration | None

    @property
    def done(self) -> bool:
        """Whether `result` has something to return or to raise at once."""
        return self._ticket.finished

    def cancel(self) -> None:
        """Free its place before the next token; nothing happens to a question that is answered."""
        self._ticket.cancel()

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the answer; Ctrl-C meanwhile cancels the question.

        Args:
            timeout: Seconds; None: as long as it takes.

        Raises:
            PgfastError: A run failed, the question was cancelled, or the engine was closed.
            TimeoutError: There is no answer yet. The work goes on; `cancel` ends it.
        """
        self._ticket.wait(timeout)
        if isinstance(self._row, ChoiceScores):
            return self._best_choice(self._row)
        text = cut_at_stop(self._tokenizer.decode(self._row.token_ids), self._options.stop).strip()
        return self._answer(text, self._row.token_ids, self._row.token_logprobs, None)

    def text(self) -> str:
        """Return what may be shown of the text already: no half characters, and nothing that a stop text could still cut off.

        Pieces are as the model makes them; only `result` strips spaces around the whole.
        """
        if isinstance(self._row, ChoiceScores):
            return ""
        done, stop = self.done, self._options.stop  # first: tokens may come in between
        text = cut_at_stop(self._tokenizer.decode(list(self._row.token_ids)), stop)
        return text if done else text[: safe_length(text, stop)]

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the question takes: the picture's, `<bos>`, text and newline."""
        tokens: int = self._ticket.prompt_length
        return tokens

    def tokens(self) -> tuple[list[int], list[float]]:
        """Return ids and natural log-probabilities so far; of choices nothing before the end, and then the best one's."""
        row = self._row
        if not isinstance(row, ChoiceScores):
            logprobs = list(row.token_logprobs)  # first: the engine's thread appends to it last
            return row.token_ids[: len(logprobs)], logprobs
        answer = self.result() if self.done else None
        return ([], []) if answer is None else (list(answer.token_ids), list(answer.token_logprobs))

    def token_texts(self) -> TokenTexts:
        """Start to say which token brings which part of the text."""
        return TokenTexts(self._tokenizer)

    def pieces(self) -> Iterator[str]:
        """Yield pieces that add up to the answer's text, if it was submitted with `streaming`; leaving early cancels.

        Raises:
            PgfastError: As in `result`.
        """
        given = ""
        with contextlib.closing(self._ticket.progress()) as progress:
            for _ in progress:
                text = self.text().strip()
                if text.startswith(given) and len(text) > len(given):
                    yield text[len(given) :]
                    given = text

    def _best_choice(self, row: ChoiceScores) -> Answer:
        assert self._choices is not None
        totals = np.array([sum(scores) for scores in row.scores])
        best = int(totals.argmax())
        shares = np.exp(totals - totals.max())
        chances = dict(zip(self._choices, (shares / shares.sum()).tolist(), strict=True))
        return self._answer(self._choices[best], row.choices[best], row.scores[best], chances)

    def _answer(self, text: str, ids: Sequence[int], logprobs: Sequence[float], chances: dict[str, float] | None) -> Answer:
        ticket, row = self._ticket, self._row
        confidence, calibrated = float(np.exp(sum(logprobs))), None
        if self._calibration is not None:
            calibrated = calibrate(confidence, self._calibration.temperature)
        least = self._options.min_confidence
        unsure = least is not None and (confidence if calibrated is None else calibrated) < least
        return Answer(
            text=UNSURE if unsure else text,
            confidence=confidence,
            token_ids=tuple(ids),
            token_logprobs=tuple(logprobs),
            finish_reason="length" if not isinstance(row, ChoiceScores) and row.finish_reason == "length" else "stop",
            choices=chances,
            timings=Timings(
                preprocess=self._preprocess,
                vision=self._vision,
                prefill=ticket.first_token - ticket.begun,
                decode=ticket.ended - ticket.first_token,
                ttft=ticket.first_token - self._start,
                total=ticket.ended - self._start,
            ),
            calibrated=calibrated,
            unsure_of=text if unsure else None,
        )
