"""What a training run is made of: one dataclass, its numbers overridable from the command line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """The demo model: a tiny PaliGemma on easy-VQA. The defaults are the recipe that the embedded bundle was made with."""

    seed: int = 42
    prompt: str = "answer {language} {text}"
    """Prompt template of the questions; the bundle keeps it."""
    validation_fraction: float = 0.05
    """Share of the training pictures held out for selection; the test split is never looked at."""

    tower_steps: int = 1100
    """Steps of the vision tower alone, on the pictures' shapes and colours (the real SigLIP is pretrained too)."""
    tower_batch: int = 128
    tower_learning_rate: float = 1e-3

    steps: int = 5000
    """Steps of the whole model."""
    pictures_per_step: int = 32
    questions_per_picture: int = 4
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.05
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    natural_from: float = 0.7
    """Share of the steps after which questions come in their natural mix; before, from a balanced one (`sampling.py`)."""

    evaluate_every: int = 500
    save_every: int = 250
    threads: int = 2

    def digest(self) -> str:
        """Hash of the values that a resumed run must share with the run it continues."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]
