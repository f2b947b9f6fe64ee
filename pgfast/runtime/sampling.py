"""Choosing a token from logits, in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64; any leading shape."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def sample(logits: NDArray[np.float32], *, temperature: float, top_k: int, top_p: float, rng: np.random.Generator) -> int:
    """Draw one token.

    Args:
        logits: [V].
        temperature: Above 0.
        top_k: Keep this many most probable tokens; 0 keeps all.
        top_p: Keep the most probable tokens until they hold this much probability (the one that crosses it included).
        rng: Exactly one number is drawn from it per call, so a row's text does not depend on its neighbours.
    """
    order = np.argsort(-logits, kind="stable")  # [V], most probable first
    if top_k:
        order = order[:top_k]
    # from the largest down, so that a tiny temperature sends the rest to zero instead of everything to infinity
    with np.errstate(over="ignore"):
        shifted = (logits[order].astype(np.float64) - logits.max()) / temperature
    weights = np.exp(shifted)
    cumulative = np.cumsum(weights / weights.sum())
    if top_p < 1:
        keep = int(np.searchsorted(cumulative, top_p)) + 1
        order, cumulative = order[:keep], cumulative[:keep]
    drawn = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(order[min(int(drawn), len(order) - 1)])
