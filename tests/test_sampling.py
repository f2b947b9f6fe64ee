"""Sampling against the distribution it promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgfast.runtime.sampling import log_softmax, penalise, sample

LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.0], np.float32)


def frequencies(draws: int = 4000, **options: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    drawn = [sample(LOGITS, rng=rng, **settings) for _ in range(draws)]  # type: ignore[arg-type]
    return np.bincount(drawn, minlength=len(LOGITS)) / draws


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def test_log_softmax_is_that_of_torch() -> None:
    import torch

    x = np.random.default_rng(0).normal(0, 30, (3, 50)).astype(np.float32)
    np.testing.assert_allclose(log_softmax(x), torch.log_softmax(torch.from_numpy(x).double(), -1).numpy(), atol=1e-9)


def test_draws_follow_the_softmax() -> None:
    for temperature in (0.5, 1.0, 2.0):
        # 4000 draws: four standard deviations of a share are below 0.032
        np.testing.assert_allclose(frequencies(temperature=temperature), softmax(LOGITS / temperature), atol=0.032)


def test_top_k_and_top_p_keep_the_most_probable() -> None:
    assert np.flatnonzero(frequencies(top_k=2)).tolist() == [1, 3]
    assert np.flatnonzero(frequencies(top_k=1)).tolist() == [1]
    share = softmax(LOGITS)
    assert np.flatnonzero(frequencies(top_p=float(share[1] * 0.9))).tolist() == [1]
    assert np.flatnonzero(frequencies(top_p=float(share[1] + share[3] * 0.5))).tolist() == [1, 3]


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    st.floats(1e-300, 1e3),
    st.integers(0, 40),
    st.floats(1e-6, 1),
    st.integers(0, 100),
)
def test_any_logits_give_a_valid_token(values: list[float], temperature: float, top_k: int, top_p: float, seed: int) -> None:
    logits = np.array(values, np.float32)
    token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, rng=np.random.default_rng(seed))
    assert 0 <= token < len(values)
    if top_k == 1 or temperature < 1e-40:
        assert logits[token] == logits.max()


@pytest.mark.parametrize("settings", [{}, {"top_k": 4000}, {"top_p": 0.98}])
def test_the_last_bits_of_the_logits_do_not_change_what_a_seed_draws(settings: dict[str, float]) -> None:
    """As between batches of different sizes. Sorted by probability, neighbours would change places and be drawn instead."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, 50_000).astype(np.float32)
    other = (logits.astype(np.float64) * (1 + rng.uniform(-1e-6, 1e-6, logits.size))).astype(np.float32)
    options: Any = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    drawn = [[sample(x, rng=np.random.default_rng(seed), **options) for seed in range(100)] for x in (logits, other)]
    assert sum(a != b for a, b in zip(*drawn, strict=True)) <= 1


def test_penalised_scores_are_those_of_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    scores = np.random.default_rng(0).normal(0, 3, 50).astype(np.float32)
    before, ids = scores.copy(), [3, 7, 7, 49, 0]
    for penalty in (1.3, 0.6, 1.0):
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), torch.from_numpy(scores[None].copy()))
        np.testing.assert_array_equal(penalise(scores, ids, penalty), wanted[0].numpy())
    np.testing.assert_array_equal(scores, before)
