"""A whole run: the folder, the base model, the plan, the training."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from pgfast.errors import TrainError

from .config import TrainConfig
from .distributed import Processes
from .plan import Progress, make_plan
from .trainer import CHECKPOINT, Trainer


def start(config: TrainConfig, out: Path, processes: Processes, on_progress: Progress) -> dict[str, Any]:
    """Train in the folder `out`, or go on there.

    Args:
        config: The run.
        out: Its folder: `config.json`, `steps.csv`, `evaluations.jsonl`, `tensorboard/`, `state/`, `checkpoint/`.
        processes: This process among the others.
        on_progress: Called after every step with (stage, done, total, message).

    Returns:
        What `Trainer.run` returns, and `checkpoint`, its folder.

    Raises:
        InputError: Values or data that cannot be used.
        TrainError: A base model that cannot be used, another run in `out`, or what stops a run.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"{out} cannot be created: {error.strerror}") from error
    checkpoint = base_checkpoint(config, out, on_progress)
    bad_rows = out / "bad-rows.jsonl" if processes.is_main else None
    plan = make_plan(
        config, checkpoint, world=processes.world, device=processes.device, bad_rows=bad_rows, on_progress=on_progress
    )
    trainer = Trainer(plan, out, processes, on_progress)
    if processes.is_main:
        _write(out / "config.json", json.dumps(dataclasses.asdict(plan.config), indent=2) + "\n")
    return {**trainer.run(), "checkpoint": str(out / CHECKPOINT)}


def base_checkpoint(config: TrainConfig, out: Path, on_progress: Progress) -> str:
    """Return the base model's folder or Hub id; the demo's is made first."""
    if config.model != "tiny":
        return config.model
    from .demo.base_model import make_base

    return str(make_base(config, out / "base", on_progress))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        raise TrainError(f"{path} cannot be written: {error.strerror}") from error
