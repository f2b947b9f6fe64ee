"""The demo model's base: a tiny PaliGemma whose vision tower already tells shapes, colours and places, the rest random.

It stands for the real base model, which starts from a pretrained SigLIP, and is made once per run.
"""

from __future__ import annotations

import os
import re
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
from ..data import demo_scenes
from ..data.demo_scenes import DemoDataset
from ..order import hold_out
from ..setup import resolve_precision
from . import easy_vqa_data, tiny_paligemma
from .scenes import Thing, make_scene
from .vision_pretraining import DenseTower, dense_loss, patch_labels

PRETRAIN = 6
"""First word of the seeds of these draws."""
SCENES = 1_000_000
"""First of the seeds of the scenes: a step has a set of its own."""
EASY_SHARE = 0.25
"""Of a step's pictures; the others are scenes."""


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
    tokenizer = tiny_paligemma.build_tokenizer([fill_template(config.prompt, language=config.language, text=""), *_texts()])
    model = tiny_paligemma.build_model(tiny_paligemma.build_config(tokenizer))
    model.set_attn_implementation(config.attention)
    tower = DenseTower(model, tokenizer)
    shape, color = easy_vqa_data.labels(questions)
    known = np.flatnonzero((shape >= 0) & (color >= 0) & ~_held_out(questions, config))
    half = resolve_precision(config.precision, torch.device("cpu")) == "bf16"
    rate, steps = config.tower_learning_rate, config.tower_steps
    betas = (config.adam_beta1, config.adam_beta2)
    named = tower.named_parameters()
    optimizer = schedule.adam(named, lr=rate, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay)
    for step in range(steps):
        rng = np.random.default_rng([PRETRAIN, config.seed, step])
        rows = rng.choice(known, size=round(config.tower_batch * EASY_SHARE))
        easy = easy_vqa_data.move_shapes(questions.images[rows], rng)
        boxes = easy_vqa_data.bounding_boxes(easy).tolist()
        single = [(Thing(int(shape[row]), int(color[row]), tuple(box)),) for row, box in zip(rows, boxes, strict=True)]
        scenes = [make_scene(SCENES + config.seed + step, number) for number in range(config.tower_batch - len(rows))]
        pictures = np.concatenate([easy, np.stack([scene.draw() for scene in scenes])])
        labels = np.stack([patch_labels(things) for things in (*single, *(scene.things for scene in scenes))])
        pixels = torch.from_numpy(normalize(pictures, tiny_paligemma.IMAGE_SPEC))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = dense_loss(tower(pixels), labels)
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


def _texts() -> list[str]:
    """All words of the data."""
    dataset = DemoDataset(1000)
    records = map(dataset.record, range(len(dataset)))
    return [re.sub(r"<loc\d+>", " ", f"{record.text} {record.answer}") for record in records]


def _held_out(questions: easy_vqa_data.Questions, config: TrainConfig) -> NDArray[np.bool_]:
    """[I], the pictures that the run keeps for evaluation: the tower must not have seen them either."""
    number = {picture: i for i, picture in enumerate(dict.fromkeys(questions.image_index.tolist()))}
    pictures = np.arange(len(number) + demo_scenes.SCENES)  # the run's data go on with the scenes
    of_picture = hold_out(pictures, config.holdout, config.seed)
    of_row = of_picture[np.array([number[picture] for picture in questions.image_index.tolist()])]
    held = np.zeros(len(questions.images), dtype=bool)
    held[questions.image_index[of_row]] = True
    return held
