"""Accuracy of a checkpoint on easy-VQA questions, through transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .easy_vqa_data import KINDS, Questions
from .model_step import answer_logits, pixel_values
from .sequence import IGNORE, Batch, Example

if TYPE_CHECKING:
    from transformers import PaliGemmaForConditionalGeneration


def accuracy(
    model: PaliGemmaForConditionalGeneration,
    questions: Questions,
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], Batch],
    batch_size: int = 128,
) -> dict[str, Any]:
    """Count the questions whose whole answer, end token included, greedy decoding would give.

    Greedy decoding gives the reference answer exactly when every position, fed with the reference, predicts the next token:
    one pass per question is enough.

    Returns:
        `accuracy` (0 to 1), `count`, and `by_kind`.
    """
    model.eval()
    order = np.argsort(questions.image_index, kind="stable")
    right = np.zeros(len(order), dtype=bool)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = collate([examples[row] for row in rows])
            pictures, of_picture = np.unique(questions.image_index[rows], return_inverse=True)
            logits, labels = answer_logits(model, pixel_values(questions.images[pictures]), of_picture, batch)
            hit = np.ones(batch.labels.shape, dtype=bool)
            hit[batch.labels != IGNORE] = (logits.argmax(-1) == labels).numpy()
            right[rows] = hit.all(axis=1)
    kinds = questions.kinds()
    by_kind = {kind: float(right[kinds == i].mean()) for i, kind in enumerate(KINDS) if (kinds == i).any()}
    return {"accuracy": float(right.mean()), "count": len(right), "by_kind": by_kind}
