"""pgfast itself, through its public API alone."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pgfast

from .base import Outcome, Probe, Request, Spec


class PgfastEngine:
    """`pgfast.load` and `Engine.generate` (one row) or `answer_batch` (several).

    `answer_batch` puts the bundle's template around a question; `_question` undoes that.
    """

    def __init__(self, spec: Spec) -> None:
        self._engine = pgfast.load(spec.path, provider=spec.provider, threads=spec.threads)
        self._template = self._engine.manifest.prompts["answer"].replace("{language}", "en")

    def answer(self, request: Request) -> Outcome:
        """Answer a request."""
        options = pgfast.GenerateOptions(max_new_tokens=request.new_tokens)
        if request.reuse_picture:
            return self._questions(request, options)
        start = time.perf_counter()
        if len(request.prompts) == 1:
            answers = [self._engine.generate(request.pictures[0], request.prompts[0], options=options)]
            total, ttft = time.perf_counter() - start, answers[0].timings.ttft
        else:
            questions: list[Any] = list(zip(request.pictures, map(self._question, request.prompts), strict=True))
            answers = self._engine.answer_batch(questions, options=options)
            total = time.perf_counter() - start
            # an answer's ttft begins with its own picture; from the end it is exact if the row that came last ends last,
            # and too long if not
            ttft = total - min(answer.timings.decode for answer in answers)
        tokens = [list(answer.token_ids) for answer in answers]
        return Outcome(tokens, ttft, total, answers[0].timings.vision)

    def _questions(self, request: Request, options: pgfast.GenerateOptions) -> Outcome:
        """The first answer pays for the picture, the others find its features."""
        start = last = time.perf_counter()
        picture = self._engine.encode_image(request.pictures[0])
        vision = time.perf_counter() - start
        outcome = Outcome([], 0.0, 0.0, vision)
        for prompt in request.prompts:
            answer = self._engine.generate(picture, prompt, options=options)
            now = time.perf_counter()
            outcome.tokens.append(list(answer.token_ids))
            outcome.each.append(now - last)
            outcome.later_vision += answer.timings.vision
            outcome.ttft = outcome.ttft or vision + answer.timings.ttft
            last = now
        outcome.total = last - start
        return outcome

    def _question(self, prompt: str) -> str:
        before, after = self._template.split("{text}")
        assert prompt == before + prompt[len(before) : len(prompt) - len(after)] + after, "not made from the bundle's template"
        return prompt[len(before) : len(prompt) - len(after)]

    def probe(self, picture: NDArray[np.uint8], prompt: str, new_tokens: int) -> Probe:
        """Return greedy tokens and the first one's log-probability."""
        answer = self._engine.generate(picture, prompt, options=pgfast.GenerateOptions(max_new_tokens=new_tokens))
        return Probe(list(answer.token_ids), answer.token_logprobs[0])

    def device_bytes(self) -> int | None:
        """None: ONNX Runtime does not tell; the runner asks the driver."""
        return None
