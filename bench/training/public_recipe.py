"""What people run: transformers' Trainer, PaliGemmaProcessor in the collator, `labels` for the loss, a frozen vision tower.

The arguments are those of `train/presets.py`, `seed`: the notebook behind the model card that pgfast started from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    PaliGemmaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from .pictures import read_rows
from .settings import Spec, order
from .stopwatch import Stopwatch

Collate = Callable[[list[dict[str, str]]], Any]


def train(spec: Spec, watch: Stopwatch) -> None:
    """Train until the watch has seen enough steps."""
    torch.set_num_threads(spec.threads)
    model, collate = load(spec)
    watch.loaded()
    rows = read_rows(Path(spec.data))
    arguments = TrainingArguments(
        output_dir=spec.out,
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.accumulation,
        learning_rate=2e-5,
        adam_beta2=0.999,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        warmup_steps=2,
        seed=spec.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        dataloader_num_workers=0,
        train_sampling_strategy="sequential",  # the rows come in pgfast's order
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    given = [rows[i] for i in order(spec, len(rows))]
    trainer = _Recorded(model=model, args=arguments, train_dataset=given, data_collator=collate)
    trainer.add_callback(_Stop(trainer, watch))
    trainer.train()


def load(spec: Spec) -> tuple[Any, Collate]:
    """Return the model, tower and projector frozen, and the collator."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(spec.checkpoint, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "vision_tower" in name or "multi_modal_projector" in name:
            parameter.requires_grad_(False)
    processor, folder = AutoProcessor.from_pretrained(spec.checkpoint), Path(spec.data).parent

    def collate(rows: list[dict[str, str]]) -> Any:
        return processor(
            text=["<image>answer " + row["question"] for row in rows],
            images=[Image.open(folder / row["image"]).convert("RGB") for row in rows],
            suffix=[row["answer"] for row in rows],
            return_tensors="pt",
            padding="longest",
        )

    return model, collate


class _Recorded(Trainer):  # type: ignore[misc]  # transformers' modules are not read by mypy
    """Keeps the loss of every pass, which the Trainer adds up."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.passes: list[torch.Tensor] = []

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*arguments, **named)
        self.passes.append(loss)
        return loss


class _Stop(TrainerCallback):  # type: ignore[misc]
    """Tells the watch of every step, and ends the run after the last one that counts."""

    def __init__(self, trainer: _Recorded, watch: Stopwatch) -> None:
        self._trainer, self._watch = trainer, watch

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> Any:
        # each pass's loss already is a share of the step's: a sum over its tokens over the tokens of all passes
        control.should_training_stop = self._watch.step(sum(float(loss) for loss in self._trainer.passes))
        self._trainer.passes.clear()
        return control
