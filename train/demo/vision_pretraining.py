"""Pretraining of the vision tower: each patch tells, in the language model's words, which thing is nearest and where that ends.

The real PaliGemma starts from a SigLIP that was trained beside texts; without this the tiny one never learns the shapes
(`docs/log.md`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from transformers import PaliGemmaForConditionalGeneration

from .easy_vqa_data import COLORS, SHAPES
from .scene_questions import location
from .scenes import MOST_THINGS, Thing
from .tiny_paligemma import IMAGE_SIZE, PATCH_SIZE

SIDE = IMAGE_SIZE // PATCH_SIZE
EDGES = IMAGE_SIZE + 1
"""Places of a box's edge."""
BLUR = 0.7
"""Pixels (standard deviation) that the place of an edge is spread over."""


class DenseTower(nn.Module):
    """Tower and projector with heads on every patch, which are thrown away afterwards.

    Words and places are told by the nearness to the language model's embeddings, which are trained with it: a question's word
    then looks like the patches it means.
    """

    def __init__(self, model: PaliGemmaForConditionalGeneration, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.embedding = model.get_input_embeddings()
        width = self.embedding.embedding_dim
        places = [location((edge, 0, 0, 0))[:9] for edge in range(EDGES)]
        self.ids = {
            "shape": [tokenizer.token_to_id(word) for word in SHAPES],
            "color": [tokenizer.token_to_id(word) for word in COLORS],
            "place": [tokenizer.token_to_id(place) for place in places],
        }
        self.edges = nn.Linear(width, 4 * width, bias=False)
        self.order = nn.Linear(width, 2 * MOST_THINGS)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """[N, 3, R, R] to logits: shape [N, P, 3], color [N, P, 8], box [N, P, 4, EDGES], order [N, P, 2, MOST_THINGS]."""
        features = self.projector(self.tower(pixels).last_hidden_state).float()  # [N, P, D]
        words = {name: self.embedding(torch.tensor(ids)).float() for name, ids in self.ids.items()}  # [W, D]
        edges = self.edges(features).unflatten(-1, (4, -1))  # [N, P, 4, D]
        return {
            "shape": features @ words["shape"].T,
            "color": features @ words["color"].T,
            "box": edges @ words["place"].T,
            "order": self.order(features).unflatten(-1, (2, MOST_THINGS)),
        }


def patch_labels(things: Sequence[Thing]) -> NDArray[np.int64]:
    """Return [P, 8] of the thing whose box is nearest to each patch's middle.

    They are shape, colour, top, left, bottom, right in pixels, and its number from the left and from the right.
    """
    middles = np.arange(SIDE) * PATCH_SIZE + PATCH_SIZE / 2
    labels, distances = [], []
    for number, thing in enumerate(things):
        top, left, bottom, right = thing.box
        down = np.maximum(np.maximum(top - middles, middles - bottom), 0)
        across = np.maximum(np.maximum(left - middles, middles - right), 0)
        distances.append(np.hypot(down[:, None], across).ravel())
        labels.append((thing.shape, thing.color, *thing.box, number, len(things) - 1 - number))
    return np.array(labels)[np.argmin(distances, axis=0)]


def dense_loss(logits: dict[str, torch.Tensor], labels: NDArray[np.int64]) -> torch.Tensor:
    """Add up the cross entropies of shape, colour, edges and order.

    Args:
        logits: What `DenseTower` gave.
        labels: [N, P, 8], `patch_labels` of each picture.
    """
    wanted = torch.from_numpy(labels)
    distance = torch.arange(EDGES) - wanted[..., 2:6, None]  # [N, P, 4, EDGES]
    spread = torch.softmax(-0.5 * (distance / BLUR) ** 2, dim=-1)
    edges = -(spread * logits["box"].log_softmax(dim=-1)).sum(dim=-1).mean()
    shape = functional.cross_entropy(logits["shape"].flatten(0, 1), wanted[..., 0].flatten())
    color = functional.cross_entropy(logits["color"].flatten(0, 1), wanted[..., 1].flatten())
    order = functional.cross_entropy(logits["order"].flatten(0, 2), wanted[..., 6:].flatten())
    return torch.stack([shape, color, edges, order]).sum()
