"""Pretraining of the vision tower: each patch tells which shape covers it, of which colour, and where that shape ends.

The real PaliGemma starts from a pretrained SigLIP; without this the tiny one never learns the shapes (`docs/log.md`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from .easy_vqa_data import COLORS, SHAPES
from .scenes import Thing
from .tiny_paligemma import IMAGE_SIZE, PATCH_SIZE

SIDE = IMAGE_SIZE // PATCH_SIZE
NOTHING = (len(SHAPES), len(COLORS))
"""Shape and colour of a patch of background."""
BOX_WEIGHT = 5.0
"""Of the distance of a box's edges, in picture sides, beside the two cross entropies."""


class DenseTower(nn.Module):
    """The vision tower with a linear head on every patch; the head is thrown away afterwards."""

    def __init__(self, vision_tower: nn.Module) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        width: int = vision_tower.config.hidden_size  # type: ignore[union-attr, assignment]
        self.sizes = (len(SHAPES) + 1, len(COLORS) + 1, 4)
        self.head = nn.Linear(width, sum(self.sizes))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[N, 3, R, R] to logits of shape [N, P, 4] and colour [N, P, 9], and boxes [N, P, 4] in picture sides."""
        patches = self.vision_tower(pixels).last_hidden_state  # [N, P, W]
        return self.head(patches).float().split(self.sizes, dim=-1)


def patch_labels(things: Sequence[Thing]) -> NDArray[np.float32]:
    """Return [P, 6]: shape, colour, and top, left, bottom, right in picture sides of what covers most of each patch's square."""
    labels = np.zeros((SIDE, SIDE, 6), np.float32)
    labels[..., :2] = NOTHING
    covered = np.zeros((SIDE, SIDE))
    starts = np.arange(SIDE) * PATCH_SIZE
    for thing in things:
        top, left, bottom, right = thing.box
        down = np.clip(np.minimum(starts + PATCH_SIZE, bottom) - np.maximum(starts, top), 0, None)
        across = np.clip(np.minimum(starts + PATCH_SIZE, right) - np.maximum(starts, left), 0, None)
        area = np.outer(down, across)
        labels[area > covered] = (thing.shape, thing.color, *(edge / IMAGE_SIZE for edge in thing.box))
        covered = np.maximum(covered, area)
    return labels.reshape(-1, 6)


def dense_loss(tower: DenseTower, pixels: torch.Tensor, labels: NDArray[np.float32]) -> torch.Tensor:
    """Sum of both cross entropies and the weighted distance of boxes; pixels [N, 3, R, R], labels [N, P, 6]."""
    shape_logits, color_logits, boxes = tower(pixels)
    wanted = torch.from_numpy(labels)
    shape, color = wanted[..., 0].long(), wanted[..., 1].long()
    there = shape != NOTHING[0]
    loss: torch.Tensor = functional.cross_entropy(shape_logits.flatten(0, 1), shape.flatten())
    loss = loss + functional.cross_entropy(color_logits.flatten(0, 1), color.flatten())
    return loss + BOX_WEIGHT * functional.l1_loss(boxes[there], wanted[..., 2:][there])
