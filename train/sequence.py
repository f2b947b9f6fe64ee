"""A PaliGemma training example as ids, labels and mask (pure numpy: no torch, no processor).

The sequence is `<image>` * P, `<bos>`, prefix, newline | suffix, `<eos>`: everything before the bar attends to itself in
both directions, the suffix is causal, and the loss is taken on the suffix alone
(big_vision, configs/proj/paligemma/transfers/common.py: mask_ar = [0, 0, 1], mask_loss = [0, 0, 1]).
Transformers' processor changed its mind about each of these between versions, so nothing here depends on it.

Shapes: B batch, L sequence (image included), P image tokens, A answer positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""Label of a position without a loss (the default `ignore_index` of torch's cross entropy)."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one question and its answer, without the image tokens."""

    prefix: Sequence[int]
    """`<bos>`, prompt tokens, newline."""
    suffix: Sequence[int]
    """Answer tokens, `<eos>`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded examples, each behind P image tokens."""

    input_ids: NDArray[np.int64]
    """[B, L]; the image positions hold the image token."""
    labels: NDArray[np.int64]
    """[B, L]; at position t the id that must follow, `IGNORE` where there is no loss."""
    prefix_lengths: NDArray[np.int64]
    """[B]; image tokens plus prefix."""
    lengths: NDArray[np.int64]
    """[B]; image tokens plus prefix plus suffix."""
    num_image_tokens: int
    """P."""

    def attention_mask(self) -> NDArray[np.bool_]:
        """Return the prefix-LM mask, [B, L, L]: True where query q may attend to key k."""
        return prefix_lm_mask(self.prefix_lengths, self.lengths, self.input_ids.shape[1])


def prefix_lm_mask(prefix_lengths: NDArray[Any], lengths: NDArray[Any], size: int) -> NDArray[np.bool_]:
    """Build the prefix-LM mask.

    Args:
        prefix_lengths: [B], tokens that attend to each other in both directions.
        lengths: [B], tokens that are not padding.
        size: L, the padded length.

    Returns:
        [B, L, L] bool. Padding is never attended to; its own rows see the prefix, so that no row is empty.
    """
    position = np.arange(size)
    query, key = position[None, :, None], position[None, None, :]
    in_prefix = key < prefix_lengths[:, None, None]
    valid = key < lengths[:, None, None]
    mask: NDArray[np.bool_] = in_prefix | ((key <= query) & valid & (query < lengths[:, None, None]))
    return mask


def collate(examples: Sequence[Example], *, image_token_id: int, num_image_tokens: int, pad_token_id: int) -> Batch:
    """Pad examples on the right into one batch.

    Raises:
        ValueError: An example has no suffix, so it would train nothing.
    """
    if any(not example.suffix for example in examples):
        raise ValueError("an example without an answer has no loss")
    prefix_lengths = np.array([num_image_tokens + len(example.prefix) for example in examples])  # [B]
    lengths = prefix_lengths + np.array([len(example.suffix) for example in examples])  # [B]
    size = int(lengths.max())
    input_ids = np.full((len(examples), size), pad_token_id, dtype=np.int64)  # [B, L]
    labels = np.full((len(examples), size), IGNORE, dtype=np.int64)  # [B, L]
    input_ids[:, :num_image_tokens] = image_token_id
    for row, example in enumerate(examples):
        input_ids[row, num_image_tokens : lengths[row]] = [*example.prefix, *example.suffix]
        # the last prefix token (the newline) predicts the first answer token
        labels[row, prefix_lengths[row] - 1 : lengths[row] - 1] = example.suffix
    return Batch(input_ids, labels, prefix_lengths, lengths, num_image_tokens)


def loss_weights(batch: Batch, reduction: str, total: float) -> NDArray[np.float32]:
    """Return what each answer position counts in the loss, [A].

    Args:
        batch: The examples.
        reduction: `token`: every token alike; `example`: every example alike, its tokens sharing it.
        total: Sum of the weights over all passes and processes of the step: answer tokens or examples.
    """
    rows = np.nonzero(batch.labels != IGNORE)[0]  # [A], in the order of `labels[labels != IGNORE]`
    shares = 1 / np.bincount(rows, minlength=len(batch.labels)) if reduction == "example" else np.ones(len(batch.labels))
    weights: NDArray[np.float32] = (shares[rows] / total).astype(np.float32)
    return weights
