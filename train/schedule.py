"""Learning-rate factors, as transformers' schedulers give them, and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch


def factor(step: int, steps: int, *, kind: str, warmup: int) -> float:
    """Return the factor of the learning rate at step 0 to steps - 1 (`get_linear_schedule_with_warmup` and its like).

    Args:
        step: Steps done before.
        steps: Of the whole run.
        kind: linear, cosine or constant, after the warm-up.
        warmup: Steps from 0 up to 1; the first one has the factor 0.
    """
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if kind == "linear":
        return max(0.0, 1 - progress)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress))) if kind == "cosine" else 1.0


def adam(
    named: Iterable[tuple[str, torch.nn.Parameter]], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Adam with decoupled weight decay on matrices only (no norms, biases or embeddings); without decay it is plain Adam."""
    decay: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            (decay if parameter.ndim >= 2 and "embed" not in name and "lm_head" not in name else plain).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
