"""Peak memory and least time of a run, from its dimensions and one measured matrix product."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from .distributed import Processes
from .plan import Plan
from .sequence import Example

PROCESS = 450_000_000
"""Python, torch and transformers, loaded; measured."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one process at the peak, and its arithmetic."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    temporaries: int
    """The head's gradient of one pass before it is added to the others, its sum with the embedding's; the process itself."""
    flops_per_step: float
    flops_per_second: float
    """Measured: one matrix product in the run's arithmetic."""

    @property
    def total(self) -> int:
        """All of it together."""
        kept = self.weights + self.gradients + self.optimizer
        return kept + self.activations + self.logits + self.temporaries

    @property
    def seconds_per_step(self) -> float:
        """If everything ran like the measured product."""
        return self.flops_per_step / self.flops_per_second


def estimate(plan: Plan, counts: dict[str, tuple[int, int]], examples: list[Example], processes: Processes) -> Estimate:
    """Reckon a run.

    Args:
        plan: The run.
        counts: `count_parameters`.
        examples: The first batch of one process: its lengths stand for all.
        processes: A whole model is sharded over them.
    """
    c, text, vision = plan.config, plan.base.config.text_config, plan.base.config.vision_config
    half = c.precision == "bf16"
    trainable = sum(t for t, _ in counts.values())
    total = sum(a for _, a in counts.values())
    trained_towers = [tower for tower, (some, _) in counts.items() if some and c.method == "full"]
    rows, image = c.batch_size, plan.base.num_image_tokens
    length = image + max(len(e.prefix) + len(e.suffix) for e in examples)
    answer_tokens = sum(len(e.suffix) for e in examples)
    shards = processes.world if c.method == "full" else 1
    if c.method == "full":
        # autocast keeps a bf16 copy for the pass; a frozen tower is not sharded
        whole = counts["vision"][1] if c.vision_frozen else 0
        weights = whole * 4 + (total - whole) * 4 // shards + (total * 2 if half else 0)
    elif c.method == "lora":
        weights = (total - trainable) * (2 if half else 4) + trainable * 4
    else:
        quantized = _matrices(text)
        weights = quantized // 2 + (total - trainable - quantized) * (2 if half else 4) + trainable * 4
    width = 2 if half else 4
    layer = _layer_activations(rows, length, text.hidden_size, text.intermediate_size, text.num_attention_heads, width)
    layers = text.num_hidden_layers
    kept = rows * length * text.hidden_size * width if c.gradient_checkpointing else layer
    activations = layers * kept + (layer if c.gradient_checkpointing else 0)
    tower = _layer_activations(rows, image, vision.hidden_size, vision.intermediate_size, vision.num_attention_heads, width)
    activations += tower * (1 if c.vision_frozen else vision.num_hidden_layers)
    return Estimate(
        weights=weights,
        gradients=trainable * 4 // shards,
        optimizer=trainable * 8 // shards,
        activations=activations,
        logits=answer_tokens * text.vocab_size * 4 * 3,  # logits, log-softmax, their gradient
        temporaries=PROCESS + (2 * text.vocab_size * text.hidden_size * 4 if "language" in trained_towers else 0),
        flops_per_step=_flops(plan, rows * length, rows * image, answer_tokens) * c.accumulation,
        flops_per_second=_measure(processes.device, torch.bfloat16 if half else torch.float32),
    )


def _layer_activations(rows: int, length: int, hidden: int, intermediate: int, heads: int, width: int) -> int:
    """Bytes that one layer keeps for its backward pass: its inputs, norms, projections, gate and up; scores with eager only."""
    return rows * length * (8 * hidden + 4 * intermediate) * width + rows * heads * length * 4


def _matrices(t: Any) -> int:
    """Weights in the matrices of all layers of transformers' text configuration."""
    attention = t.hidden_size * t.head_dim * (2 * t.num_attention_heads + 2 * t.num_key_value_heads)
    return int(t.num_hidden_layers * (attention + 3 * t.hidden_size * t.intermediate_size))


def _flops(plan: Plan, positions: int, patches: int, answer_tokens: int) -> float:
    c, text, vision = plan.config, plan.base.config.text_config, plan.base.config.vision_config
    language = 2.0 * positions * _matrices(text)
    head = 2.0 * answer_tokens * text.vocab_size * text.hidden_size
    tower = (
        2.0
        * patches
        * vision.num_hidden_layers
        * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
    )
    trained = c.method == "full" and "language" not in c.frozen
    # backward: the gradient of activations costs as much as the forward pass, that of weights once more; recomputing once more
    passes = 1 + 1 + trained + c.gradient_checkpointing
    seen = 0.0 if c.feature_cache else tower
    return language * passes + head * (2 + trained) + (seen if c.vision_frozen else tower * 3)


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024  # large enough that starting it costs nothing beside it
    a = torch.randn((size, size), device=device).to(dtype)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < 0.3:  # where bf16 is emulated one product takes seconds
        start = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
