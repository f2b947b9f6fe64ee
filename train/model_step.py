"""One forward pass for training and for evaluation, with our own prefix-LM mask and an answer-only head.

Shapes: I pictures, B questions, L sequence, P image tokens, D hidden size, A answer positions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from .sequence import IGNORE, Batch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PaliGemmaForConditionalGeneration


def pixel_values(images: NDArray[np.uint8]) -> torch.Tensor:
    """Turn pictures of the model's own size, uint8 [I, R, R, 3], into float32 [I, 3, R, R] in -1..1."""
    scaled = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return (scaled / 255 - 0.5) / 0.5


def answer_logits(
    model: PaliGemmaForConditionalGeneration, pixels: torch.Tensor, image_index: NDArray[np.int64], batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model and its head on the answer positions alone.

    The image comes first in every row, so a concatenation replaces transformers' masked scatter, and each picture goes
    through the vision tower once however many questions it has.

    Args:
        model: The model; its attention must be `sdpa` or `eager` (they take a 4-D mask as it is).
        pixels: [I, 3, R, R].
        image_index: [B], the picture of each question.
        batch: The questions.

    Returns:
        (logits [A, V] float32, labels [A]), A counted over the whole batch.
    """
    base = model.model
    input_ids = torch.from_numpy(batch.input_ids)  # [B, L]
    features = base.get_image_features(pixels).pooler_output  # [I, P, D]
    text = base.get_input_embeddings()(input_ids[:, features.shape[1] :])  # [B, L - P, D], scaled by sqrt(D) inside
    embeds = torch.cat([features[torch.from_numpy(image_index)].to(text.dtype), text], dim=1)  # [B, L, D]
    allowed = torch.from_numpy(batch.attention_mask())[:, None]  # [B, 1, L, L]
    additive = torch.zeros(allowed.shape, dtype=embeds.dtype).masked_fill(~allowed, torch.finfo(embeds.dtype).min)
    positions = torch.arange(1, embeds.shape[1] + 1)[None]  # 1-based, as transformers counts
    hidden = base.language_model(
        inputs_embeds=embeds, attention_mask=additive, position_ids=positions, use_cache=False
    ).last_hidden_state  # [B, L, D]
    labels = torch.from_numpy(batch.labels)
    answered = labels != IGNORE
    return model.lm_head(hidden[answered]).float(), labels[answered]


def answer_loss(
    model: PaliGemmaForConditionalGeneration, pixels: torch.Tensor, image_index: NDArray[np.int64], batch: Batch
) -> torch.Tensor:
    """Return the mean cross entropy over the answer tokens (`answer_logits` has the arguments)."""
    logits, labels = answer_logits(model, pixels, image_index, batch)
    return functional.cross_entropy(logits, labels)
