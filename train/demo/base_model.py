"""The demo model's base: a tiny PaliGemma whose vision tower already tells shapes and colours, the rest random.

It stands for the real base model, which starts from a pretrained SigLIP, and is made once per run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pgfast.errors import TrainError
from pgfast.image import normalize
from pgfast.prompt import fill_template

from .. import schedule
from ..config import TrainConfig
from ..order import hold_out
from ..setup import resolve_precision
from . import easy_vqa_data, tiny_paligemma
from .vision_pretraining import TowerClassifier, tower_loss

PRETRAIN = 6
"""First word of the seeds of these draws."""


def make_base(config: TrainConfig, folder: Path, on_progress: Callable[[str, int, int, str], None]) -> Path:
    """Pretrain the tower and write the base as a Hugging Face folder; a folder that is there is taken as it is.

    Args:
        config: The run.
        folder: Where; written beside and renamed.
        on_progress: Called after every step.

    Raises:
        TrainError: The folder cannot be written.
    """
    if folder.exists():
        return folder
    torch.manual_seed(config.seed)
    questions = easy_vqa_data.load("train")
    words = [fill_template(config.prompt, language=config.language, text=""), *questions.texts, *questions.answers]
    tokenizer = tiny_paligemma.build_tokenizer(words)
    model = tiny_paligemma.build_model(tiny_paligemma.build_config(tokenizer))
    model.set_attn_implementation(config.attention)
    tower = TowerClassifier(model.model.vision_tower)
    shape, color = easy_vqa_data.labels(questions)
    known = np.flatnonzero((shape >= 0) & (color >= 0) & ~_held_out(questions, config))
    half = resolve_precision(config.precision, torch.device("cpu")) == "bf16"
    rate, steps = config.tower_learning_rate, config.tower_steps
    betas = (config.adam_beta1, config.adam_beta2)
    named = tower.named_parameters()
    optimizer = schedule.adam(named, lr=rate, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay)
    for step in range(steps):
        rng = np.random.default_rng([PRETRAIN, config.seed, step])
        rows = rng.choice(known, size=config.tower_batch)
        pictures = easy_vqa_data.move_shapes(questions.images[rows], rng)
        pixels = torch.from_numpy(normalize(pictures, tiny_paligemma.IMAGE_SPEC))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = tower_loss(tower, pixels, shape[rows], color[rows])
        schedule.set_learning_rate(optimizer, rate * schedule.factor(step, steps, kind="linear", warmup=0))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), config.clip_norm)
        optimizer.step()
        on_progress("vision tower", step + 1, steps, f"loss {loss.item():.4f}")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        tiny_paligemma.save_checkpoint(partial, model, tokenizer)
        os.replace(partial, folder)
    except OSError as error:
        raise TrainError(f"{folder} cannot be written: {error.strerror}") from error
    return folder


def _held_out(questions: easy_vqa_data.Questions, config: TrainConfig) -> NDArray[np.bool_]:
    """[I], the pictures that the run keeps for evaluation: the tower must not have seen them either."""
    number = {picture: i for i, picture in enumerate(dict.fromkeys(questions.image_index.tolist()))}
    of_row = hold_out(np.array([number[picture] for picture in questions.image_index.tolist()]), config.holdout, config.seed)
    held = np.zeros(len(questions.images), dtype=bool)
    held[questions.image_index[of_row]] = True
    return held
