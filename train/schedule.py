"""Learning-rate schedule and optimizer groups."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch


def cosine(step: int, steps: int, warmup_fraction: float) -> float:
    """Return the factor of step 0..steps-1: a linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(steps * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def linear(step: int, steps: int) -> float:
    """Return the factor of step 0..steps-1: linear to zero."""
    return 1 - step / steps


def adamw(
    named: Iterable[tuple[str, torch.nn.Parameter]], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (no norms, biases or embeddings)."""
    decay: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in named:
        (decay if parameter.ndim >= 2 and "embed" not in name else plain).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
