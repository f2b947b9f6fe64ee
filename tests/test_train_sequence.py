"""Training sequences: ids, labels, mask and weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pgfast.train.sequence import IGNORE, Example, collate, prefix_lm_mask

EXAMPLES = [Example([2, 7, 5, 4], [10, 1]), Example([2, 8, 9, 12, 13, 4], [11, 12, 13, 1])]


def test_layout_of_ids_and_labels() -> None:
    batch = collate(EXAMPLES, image_token_id=99, num_image_tokens=3, pad_token_id=0)
    assert batch.input_ids.tolist() == [
        [99, 99, 99, 2, 7, 5, 4, 10, 1, 0, 0, 0, 0],
        [99, 99, 99, 2, 8, 9, 12, 13, 4, 11, 12, 13, 1],
    ]
    x = IGNORE
    assert batch.labels.tolist() == [
        [x, x, x, x, x, x, 10, 1, x, x, x, x, x],
        [x, x, x, x, x, x, x, x, 11, 12, 13, 1, x],
    ]


def test_an_example_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="without an answer"):
        collate([Example([2, 4], [])], image_token_id=99, num_image_tokens=1, pad_token_id=0)


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 6)), min_size=1, max_size=5))
def test_the_mask_is_the_prefix_lm_mask(lengths: list[tuple[int, int]]) -> None:
    prefix = np.array([p for p, _ in lengths])
    total = np.array([p + s for p, s in lengths])
    size = int(total.max())
    mask = prefix_lm_mask(prefix, total, size)
    for row, (p, n) in enumerate(zip(prefix, total, strict=True)):
        for q in range(n):
            for k in range(size):
                assert mask[row, q, k] == (k < p or (k <= q and k < n))
        assert mask[row].any(axis=1).all()  # no query is left without a key
        assert not mask[row, :, n:].any()
