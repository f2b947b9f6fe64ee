"""The token loop: prompts in, ids out. It knows ids and tensors, no text and no pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.types import GenerateOptions

from .decoder import Decoder
from .sampling import log_softmax, sample

StopCheck = Callable[[Sequence[int]], bool]
"""Says whether the ids generated so far contain a stop text."""


@dataclass(slots=True)
class Row:
    """What one row of the batch has generated so far."""

    token_ids: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True)
class Clock:
    """`time.perf_counter` readings of one generation."""

    start: float = 0.0
    first_token: float = 0.0
    end: float = 0.0


def generate(
    decoder: Decoder,
    image_features: NDArray[Any],
    prompts: list[list[int]],
    options: GenerateOptions,
    *,
    max_new_tokens: int,
    eos_id: int,
    stopped: StopCheck,
    clock: Clock,
) -> Generator[list[Row]]:
    """Generate, yielding the rows after every token (the same objects each time).

    Args:
        decoder: Owns session and cache.
        image_features: [B, P, D].
        prompts: Ids of each row.
        options: Sampling and stop texts.
        max_new_tokens: Upper bound for every row.
        eos_id: Ends a row.
        stopped: Called with a row's ids when there are stop texts.
        clock: Filled in.
    """
    rows = [Row() for _ in prompts]
    # a generator per row: the same seed gives the same text in any batch
    rngs = [np.random.default_rng(options.seed) for _ in rows]
    clock.start = time.perf_counter()
    chosen = decoder.prompt(image_features, prompts)
    for count in range(1, max_new_tokens + 1):
        # 1) Choose: greedy reads two numbers per row, sampling needs the logits.
        logprobs: NDArray[Any]
        if options.temperature > 0:
            tokens, logprobs = _sample_rows(_logits(decoder, len(rows)), options, rngs)
        else:
            tokens, logprobs = chosen.tokens[0], chosen.logprobs[0]
        if count == 1:
            clock.first_token = time.perf_counter()
        # 2) Record, row by row; finished rows are computed along and ignored.
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if row.finish_reason is not None:
                continue
            row.token_ids.append(token)
            row.token_logprobs.append(logprob)
            if token == eos_id or (options.stop and stopped(row.token_ids)):
                row.finish_reason = "stop"
            elif count == max_new_tokens:
                row.finish_reason = "length"
        clock.end = time.perf_counter()
        yield rows
        if all(row.finish_reason is not None for row in rows):
            return
        # 3) One position per run; the cache stays where it is.
        chosen = decoder.step(len(rows), tokens if options.temperature > 0 else None)


def _logits(decoder: Decoder, rows: int) -> NDArray[np.float32]:
    return np.stack([decoder.logits(row) for row in range(rows)])  # [B, V]


def _sample_rows(
    logits: NDArray[np.float32], options: GenerateOptions, rngs: Sequence[np.random.Generator]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    drawn = [
        sample(row, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, rng=rng)
        for row, rng in zip(logits, rngs, strict=True)
    ]
    tokens = np.array(drawn, dtype=np.int64)
    return tokens, np.take_along_axis(log_softmax(logits), tokens[:, None], axis=1)[:, 0]


def score_choices(
    decoder: Decoder, image_features: NDArray[Any], prompt: list[int], choices: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Score given continuations of one prompt exactly: log-probability of every token of every choice.

    Args:
        decoder: Owns session and cache.
        image_features: [1, P, D].
        prompt: Ids of the prompt.
        choices: Ids of each choice, end token included.
    """
    batch = len(choices)
    decoder.prompt(np.repeat(image_features, batch, axis=0), [prompt] * batch)
    longest = max(map(len, choices))
    scores: list[list[float]] = [[] for _ in choices]
    for position in range(longest):
        logprobs = log_softmax(_logits(decoder, batch))  # [B, V]
        for row, ids in enumerate(choices):
            if position < len(ids):
                scores[row].append(float(logprobs[row, ids[position]]))
        if position + 1 < longest:
            decoder.step(batch, np.array([ids[min(position, len(ids) - 1)] for ids in choices], dtype=np.int64))
    return scores
