"""Pretraining of the vision tower: each patch tells, in the language model's words, what covers it and where that thing ends.

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
NOTHING = (len(SHAPES), len(COLORS))
"""Shape and colour of a patch of background."""
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
        self.nothing = nn.Linear(width, 2)
        self.edges = nn.Linear(width, 4 * width, bias=False)
        self.order = nn.Linear(width, 2 * MOST_THINGS)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """[N, 3, R, R] to logits: shape [N, P, 4], color [N, P, 9], box [N, P, 4, EDGES], order [N, P, 2, MOST_THINGS]."""
        features = self.projector(self.tower(pixels).last_hidden_state).float()  # [N, P, D]
        words = {name: self.embedding(torch.tensor(ids)).float() for name, ids in self.ids.items()}  # [W, D]
        nothing = self.nothing(features).split(1, dim=-1)
        edges = self.edges(features).unflatten(-1, (4, -1))  # [N, P, 4, D]
        return {
            "shape": torch.cat([features @ words["shape"].T, nothing[0]], dim=-1),
            "color": torch.cat([features @ words["color"].T, nothing[1]], dim=-1),
            "box": edges @ words["place"].T,
            "order": self.order(features).unflatten(-1, (2, MOST_THINGS)),
        }


def patch_labels(things: Sequence[Thing]) -> NDArray[np.int64]:
    """Return [P, 8] of what covers most of each patch's square.

    They are shape, colour, top, left, bottom, right in pixels, and its number from the left and from the right.
    """
    labels = np.zeros((SIDE, SIDE, 8), np.int64)
    labels[..., :2] = NOTHING
    covered = np.zeros((SIDE, SIDE))
    starts = np.arange(SIDE) * PATCH_SIZE
    for number, thing in enumerate(things):
        top, left, bottom, right = thing.box
        down = np.clip(np.minimum(starts + PATCH_SIZE, bottom) - np.maximum(starts, top), 0, None)
        across = np.clip(np.minimum(starts + PATCH_SIZE, right) - np.maximum(starts, left), 0, None)
        area = np.outer(down, across)
        labels[area > covered] = (thing.shape, thing.color, *thing.box, number, len(things) - 1 - number)
        covered = np.maximum(covered, area)
    return labels.reshape(-1, 8)


def dense_loss(logits: dict[str, torch.Tensor], labels: NDArray[np.int64]) -> torch.Tensor:
    """Add up the cross entropies: of shape and colour on all patches, of edges and order on those that a thing covers.

    Args:
        logits: What `DenseTower` gave.
        labels: [N, P, 8], `patch_labels` of each picture.
    """
    wanted = torch.from_numpy(labels)
    there = wanted[..., 0] != NOTHING[0]  # [N, P]
    distance = torch.arange(EDGES) - wanted[there][:, 2:6, None]  # [covered, 4, EDGES]
    spread = torch.softmax(-0.5 * (distance / BLUR) ** 2, dim=-1)
    edges = -(spread * logits["box"][there].log_softmax(dim=-1)).sum(dim=-1).mean()
    shape = functional.cross_entropy(logits["shape"].flatten(0, 1), wanted[..., 0].flatten())
    color = functional.cross_entropy(logits["color"].flatten(0, 1), wanted[..., 1].flatten())
    order = functional.cross_entropy(logits["order"][there].flatten(0, 1), wanted[there][:, 6:].flatten())
    return torch.stack([shape, color, edges, order]).sum()
