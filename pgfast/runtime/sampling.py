"""Choosing a token from logits, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64; any leading shape."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def penalise(scores: NDArray[Any], ids: Sequence[int], penalty: float) -> NDArray[Any]:
    """Make tokens less probable that were there already, as transformers' `RepetitionPenaltyLogitsProcessor` does.

    Args:
        scores: [V], logits or log-probabilities; they stay as they are.
        ids: The tokens; one that is there several times counts once.
        penalty: Positive scores are divided by it, negative ones multiplied.
    """
    changed, there = scores.copy(), np.asarray(ids, np.int64)
    changed[there] = np.where(scores[there] < 0, scores[there] * penalty, scores[there] / penalty)
    return changed


def sample(logits: NDArray[np.float32], *, temperature: float, top_k: int, top_p: float, rng: np.random.Generator) -> int:
    """Draw one token.

    Probabilities are added up in the order of the ids, not of the probabilities: in another batch logits differ in their last
    bits, which would let tokens that are nearly as probable change places, and so change what a seed draws.

    Args:
        logits: [V].
        temperature: Above 0.
        top_k: Keep this many most probable tokens; 0 keeps all.
        top_p: Keep the most probable tokens until they hold this much probability (the one that crosses it included).
        rng: Exactly one number is drawn from it per call, so a row's text does not depend on its neighbours.
    """
    # from the largest down, so that a tiny temperature sends the rest to zero instead of everything to infinity
    with np.errstate(over="ignore"):
        shifted = (logits.astype(np.float64) - logits.max()) / temperature
    weights = np.exp(shifted)  # [V]
    if top_k or top_p < 1:
        order = np.argsort(-logits, kind="stable")[: top_k or None]  # most probable first
        if top_p < 1:
            held = np.cumsum(weights[order] / weights[order].sum())
            order = order[: int(np.searchsorted(held, top_p)) + 1]
        kept = np.zeros_like(weights)
        kept[order] = weights[order]
        weights = kept
    cumulative = np.cumsum(weights)
    drawn = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    # rounded up to the sum itself: the last token that adds to it
    return int(min(drawn, np.searchsorted(cumulative, cumulative[-1])))
