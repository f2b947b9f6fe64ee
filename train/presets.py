"""Recipes as data. A preset changes defaults of `TrainConfig`; flags change presets."""

from __future__ import annotations

from typing import Any

from pgfast.errors import InputError

from .config import TrainConfig

# The card of the PaliGemma fine-tune on VQAv2 that this project started from, and the notebook behind it
# (May 2024: prefix "answer ", vision tower and projector frozen; transformers' Trainer clips gradients at 1). Two things differ
# on purpose: fp32 masters instead of pure bf16 weights, in which most updates round away, and steps that run across epochs.
_SEED = {
    "model": "google/paligemma-3b-pt-224",
    "method": "full",
    "freeze": "vision,projector",
    "prompt": "answer {text}",
    "learning_rate": 2e-5,
    "batch_size": 4,
    "eval_batch_size": 8,
    "accumulation": 4,
    "seed": 42,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "schedule": "linear",
    "warmup_steps": 2,
    "epochs": 10.0,
}

# big_vision, configs/proj/paligemma/transfers/vqav2.py, "simple recipe" of arXiv 2407.07726: no weight decay (their best run at
# 224 pixels has 1e-6 on the vision tower's matrices, which big_vision does not multiply by the learning rate)
_BV = {
    "model": "google/paligemma-3b-pt-224",
    "method": "full",
    "prompt": "answer en {text}",
    "answers": "cycle",
    "learning_rate": 1e-5,
    "batch_size": 4,
    "accumulation": 64,
    "schedule": "cosine",
    "warmup_fraction": 0.05,
    "clip_norm": 1.0,
    "loss_reduction": "example",
    "epochs": 10.0,
    "gradient_checkpointing": True,
}

# LoRA in the language model alone; learning rate and epochs as its users take them (peft's examples, merve's notebook)
_LORA = {
    "model": "google/paligemma-3b-pt-224",
    "method": "lora",
    "prompt": "answer en {text}",
    "lora_rank": 8,
    "lora_alpha": 8.0,
    "learning_rate": 2e-4,
    "batch_size": 4,
    "accumulation": 4,
    "schedule": "cosine",
    "warmup_fraction": 0.05,
    "epochs": 2.0,
}

# The demo model inside the package: a tiny PaliGemma from nothing (docs/log.md says what decided its accuracy)
_TINY = {
    "model": "tiny",
    "prompt": "answer {language} {text}",
    "attention": "eager",
    "data": "demo:train",
    "holdout": 0.05,
    "eval_limit": 2000,
    "freeze": "vision,projector",
    "order": "balanced",
    "augment": "move-shapes",
    "tower_steps": 5000,
    "tower_batch": 64,
    "max_steps": 8000,
    "batch_size": 96,
    "accumulation": 1,
    "learning_rate": 2e-3,
    "loss_reduction": "token",
    "schedule": "cosine",
    "warmup_fraction": 0.05,
    "adam_beta2": 0.95,
    "weight_decay": 0.05,
    "eval_batch_size": 128,
    "evaluations": 8,
    "max_new_tokens": 32,
    "save_every": 250,
}

PRESETS: dict[str, dict[str, Any]] = {
    "seed": _SEED,
    "bv": _BV,
    "lora": _LORA,
    "qlora": {**_LORA, "method": "qlora"},
    "tiny": _TINY,
}


_REPLACES = {
    "warmup_steps": "warmup_fraction",
    "warmup_fraction": "warmup_steps",
    "epochs": "max_steps",
    "eval_data": "holdout",
}
"""A value that is given takes the place of a preset's other way to say the same."""


def resolve(preset: str, overrides: dict[str, Any]) -> TrainConfig:
    """Return the preset with some values changed.

    Raises:
        InputError: An unknown preset, or a value out of range.
    """
    if preset not in PRESETS:
        raise InputError(f"there is no preset {preset!r}: one of {', '.join(PRESETS)}")
    replaced = {_REPLACES[name] for name in overrides if name in _REPLACES}
    values = {name: value for name, value in PRESETS[preset].items() if name not in replaced}
    return TrainConfig(**{"preset": preset, **values, **overrides})
