"""Pretraining of the vision tower: tell each picture's shape and colour from the mean of its patches.

The real PaliGemma starts from a pretrained SigLIP; without this the tiny one never learns the shapes (`docs/log.md`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from .easy_vqa_data import COLORS, SHAPES


class TowerClassifier(nn.Module):
    """The vision tower with two linear heads on its mean patch; the heads are thrown away afterwards."""

    def __init__(self, vision_tower: nn.Module) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        width: int = vision_tower.config.hidden_size  # type: ignore[union-attr, assignment]
        self.shape = nn.Linear(width, len(SHAPES))
        self.color = nn.Linear(width, len(COLORS))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, 3, R, R] to logits of shape [N, 3] and colour [N, 8]."""
        pooled = self.vision_tower(pixels).last_hidden_state.mean(dim=1)
        return self.shape(pooled).float(), self.color(pooled).float()

    def heads_state(self) -> dict[str, Any]:
        """Return the weights of the two heads."""
        return {"shape": self.shape.state_dict(), "color": self.color.state_dict()}

    def load_heads(self, state: dict[str, Any]) -> None:
        """Load what `heads_state` gave."""
        self.shape.load_state_dict(state["shape"])
        self.color.load_state_dict(state["color"])


def tower_loss(
    tower: TowerClassifier, pixels: torch.Tensor, shape: NDArray[np.int64], color: NDArray[np.int64]
) -> torch.Tensor:
    """Sum of the two cross entropies; pixels [N, 3, R, R], shape and color [N]."""
    shape_logits, color_logits = tower(pixels)
    loss: torch.Tensor = functional.cross_entropy(shape_logits, torch.from_numpy(shape))
    return loss + functional.cross_entropy(color_logits, torch.from_numpy(color))
