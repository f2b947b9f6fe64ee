"""The interface of a contender, and what all of them share: the same pixels, the same ids, the same end of an answer.

Pictures are prepared and questions tokenized by pgfast's own functions for every contender, so that all compute the same
function of the same numbers; a peer's own (slower) processor is left out in its favour.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pgfast.bundle import Bundle
from pgfast.image import open_image, to_pixel_values
from pgfast.manifest import TOKENIZER
from pgfast.prompt import Tokenizer


@dataclass(frozen=True, slots=True)
class Spec:
    """How to start a contender; travels to its process as JSON."""

    name: str
    kind: str
    """Key of `registry.KINDS`."""
    path: str
    """Bundle, checkpoint or export."""
    bundle: str
    """Bundle whose manifest and tokenizer prepare the input; for pgfast the same as `path`."""
    precision: str
    threads: int
    provider: str = "cpu"

    @property
    def ours(self) -> bool:
        """Whether it is pgfast itself rather than a peer."""
        return self.kind == "pgfast"


@dataclass(frozen=True, slots=True)
class Request:
    """One measured piece of work: prompts about pictures, answered together."""

    pictures: list[NDArray[np.uint8]]
    """One per row, [H, W, 3]."""
    prompts: list[str]
    """Raw prompts, one per row."""
    new_tokens: int
    reuse_picture: bool = False
    """Ask the prompts one after the other about the first picture, whose features may be kept."""


@dataclass(slots=True)
class Outcome:
    """What one request took, in seconds."""

    tokens: list[list[int]]
    ttft: float
    """From the request to the first token of every row."""
    total: float
    """From the request to the last token, text included."""
    vision: float | None = None
    """Vision encoder, where the contender tells: the first picture."""
    later_vision: float = 0.0
    """Vision encoder, of all questions after the first about the same picture."""
    each: list[float] = field(default_factory=list)
    """Of requests that reuse the picture: the time of each question."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a contender computes, to compare functions: greedy tokens, and the natural log-probability of the first."""

    tokens: list[int]
    first_logprob: float


class Contender(Protocol):
    """A loaded model that answers; constructing it loads it."""

    def answer(self, request: Request) -> Outcome:
        """Do the work of a request."""
        ...

    def probe(self, picture: NDArray[np.uint8], prompt: str, new_tokens: int) -> Probe:
        """Return the function's value, untimed."""
        ...

    def device_bytes(self) -> int | None:
        """Peak device memory; None on the CPU."""
        ...


class Inputs:
    """Pictures to pixels and prompts to ids, as the bundle's manifest says."""

    def __init__(self, bundle: str) -> None:
        opened = Bundle.open(Path(bundle))
        self.manifest = opened.manifest
        self._tokenizer = Tokenizer(opened.path(TOKENIZER), bos_id=self.manifest.tokens.bos)

    def pixels(self, pictures: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Return float32 [B, 3, R, R]."""
        return np.concatenate([to_pixel_values(open_image(picture), self.manifest.image) for picture in pictures])

    def ids(self, prompts: list[str]) -> NDArray[np.int64]:
        """Return int64 [B, S] without image tokens; rows must have the same length."""
        rows = [self._tokenizer.encode_prompt(text, max_tokens=self.manifest.limits.prompt_tokens) for text in prompts]
        return np.array(rows, np.int64)

    def text(self, tokens: list[list[int]]) -> list[str]:
        """Return the texts of generated ids."""
        return [self._tokenizer.decode(row) for row in tokens]


Step = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""Tokens [B] in, next tokens [B] out."""


def greedy_loop(first: NDArray[np.int64], step: Step, new_tokens: int, eos: int) -> list[list[int]]:
    """Continue greedily from the first tokens [B] until every row has ended or has `new_tokens`; `<eos>` is kept."""
    rows = [[token] for token in first.tolist()]
    tokens = first
    while True:
        open_rows = [len(row) < new_tokens and row[-1] != eos for row in rows]
        if not any(open_rows):
            return rows
        tokens = step(tokens)
        for row, token, is_open in zip(rows, tokens.tolist(), open_rows, strict=True):
            if is_open:
                row.append(token)


def one_by_one(contender: Contender, request: Request) -> Outcome:
    """Ask all prompts about the first picture as a contender does that keeps nothing between questions."""
    start, picture = time.perf_counter(), request.pictures[:1]
    outcomes = [contender.answer(Request(picture, [prompt], request.new_tokens)) for prompt in request.prompts]
    return Outcome(
        tokens=[outcome.tokens[0] for outcome in outcomes],
        ttft=outcomes[0].ttft,
        total=time.perf_counter() - start,
        vision=outcomes[0].vision,
        each=[outcome.total for outcome in outcomes],
    )


def log_probability(logits: NDArray[Any], token: int) -> float:
    """Natural log-probability of a token under logits [V]."""
    wide = logits.astype(np.float64)
    return float(wide[token] - wide.max() - np.log(np.exp(wide - wide.max()).sum()))
