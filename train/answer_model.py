"""One forward pass for training and for greedy answers, with our own prefix-LM mask and a head on answer positions only.

Shapes: I pictures, B questions, L sequence, P image tokens, D hidden size, W width of the vision tower, A answer positions,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from .sequence import IGNORE, Batch

if TYPE_CHECKING:
    from transformers import PaliGemmaForConditionalGeneration

HEAD_CHUNK = 1024
"""Answer positions that meet the head at once while training: 1 GiB of fp32 logits at 257,216 words."""


class AnswerModel(nn.Module):
    """A PaliGemma behind one `forward`, which is what DDP and FSDP wrap.

    Args:
        model: The model, with adapters in place; its attention must be `sdpa` or `eager` (they take a 4-D mask as it is).
        vision_frozen: The vision tower runs without gradients.
        projector_frozen: So does the projector.
    """

    def __init__(self, model: PaliGemmaForConditionalGeneration, *, vision_frozen: bool, projector_frozen: bool) -> None:
        super().__init__()
        self.model = model
        self._vision_frozen, self._projector_frozen = vision_frozen, projector_frozen
        self._softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def forward(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        selected: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_hidden: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        cache: Any = None,
        only_vision: bool = False,
    ) -> torch.Tensor:
        """Run the model; the image comes first in every row, so a concatenation replaces transformers' masked scatter.

        Args:
            input_ids: [B, S] text ids, without the image tokens.
            mask: [B, L, T] bool: which of T keys each of the L positions of this pass may attend to.
            selected: [B, L] bool: positions that meet the head, A in all.
            labels: [A] the ids that must follow them.
            pixel_values: [I, 3, R, R]; each picture goes through the vision tower once however many questions it has.
            image_hidden: [I, P, W], the vision tower's output instead.
            image_index: [B], the picture of each question; None while decoding, when the image is in the cache.
            cache: Keys and values of earlier passes, transformers' `DynamicCache`.
            only_vision: Return the vision tower's output [I, P, W] and nothing else.

        Returns:
            With labels the negative log-likelihood of each, float32 [A]; without them the logits, float32 [A, V].
        """
        base = self.model.model
        if pixel_values is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._vision_frozen):
                image_hidden = base.vision_tower(pixel_values).last_hidden_state  # [I, P, W]
            if only_vision:
                return image_hidden
        embeds = base.get_input_embeddings()(input_ids)  # [B, S, D], scaled by sqrt(D) inside
        if image_hidden is not None and image_index is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not (self._vision_frozen and self._projector_frozen)):
                features = base.multi_modal_projector(image_hidden)  # [I, P, D]
            embeds = torch.cat([features[image_index].to(embeds.dtype), embeds], dim=1)  # [B, L, D]
        additive = torch.zeros(mask.shape, dtype=embeds.dtype, device=mask.device)
        additive = additive.masked_fill(~mask, torch.finfo(embeds.dtype).min)[:, None]  # [B, 1, L, T]
        first = mask.shape[2] - mask.shape[1] + 1  # positions are counted from 1, as transformers does
        positions = torch.arange(first, first + mask.shape[1], device=mask.device)[None]
        hidden = base.language_model(
            inputs_embeds=embeds,
            attention_mask=additive,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state[selected]  # [A, D]
        if labels is None:
            return self._logits(hidden)
        parts = zip(hidden.split(HEAD_CHUNK), labels.split(HEAD_CHUNK), strict=True)
        return torch.cat([functional.cross_entropy(self._logits(h), y, reduction="none") for h, y in parts])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.lm_head(hidden).float()
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


def batch_tensors(batch: Batch, image_index: NDArray[np.int64], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the arguments of `AnswerModel.forward` that come from a batch of examples."""
    answered = batch.labels != IGNORE  # [B, L]
    arrays = {
        "input_ids": batch.input_ids[:, batch.num_image_tokens :],
        "mask": batch.attention_mask(),
        "selected": answered,
        "labels": batch.labels[answered],
        "image_index": image_index,
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}


@torch.inference_mode()
def greedy(
    model: nn.Module,
    image_hidden: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Decode greedily; all prompts have one length, so that nothing is padded.

    Args:
        model: An `AnswerModel`, or what wraps it.
        image_hidden: [B, P, W], the vision tower's output for each prompt.
        prompts: B prompts, `<bos>` to newline.
        eos_id: Ends an answer.
        max_new_tokens: The most tokens of an answer.

    Returns:
        Token ids of each answer, without the end token.
    """
    from transformers import DynamicCache

    rows, device = len(prompts), image_hidden.device
    cache = DynamicCache()
    ids = torch.tensor(prompts, device=device)  # [B, S]
    length = image_hidden.shape[1] + ids.shape[1]
    extra: dict[str, Any] = {"image_hidden": image_hidden, "image_index": torch.arange(rows, device=device)}
    answers: list[list[int]] = [[] for _ in prompts]
    ended = [False] * rows
    for done in range(max_new_tokens):
        selected = torch.zeros((rows, length if done == 0 else 1), dtype=torch.bool, device=device)
        selected[:, -1] = True
        mask = torch.ones((rows, selected.shape[1], length + done), dtype=torch.bool, device=device)
        ids = model(ids, mask, selected, cache=cache, **extra).argmax(-1, keepdim=True)  # [B, 1]
        if isinstance(model, FSDPModule):
            dist.broadcast(ids, 0)  # all must stop at the same token, whatever their rounding
        extra = {}
        for row, token in enumerate(ids[:, 0].tolist()):
            ended[row] = ended[row] or token == eos_id
            if not ended[row]:
                answers[row].append(token)
        if all(ended):
            break
    return answers
