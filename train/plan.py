"""Everything about a run that is decided and checked before the first step."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pgfast.errors import InputError

from .config import TrainConfig
from .data.preflight import Preflight, check
from .data.records import Dataset, Record, RowError
from .data.sources import open_dataset
from .demo import easy_vqa_data
from .demo.balanced_order import BalancedOrder
from .demo.mixed_order import SCENE_SHARE, MixedOrder
from .encoding import Encoder
from .order import EpochOrder, RowOrder, hold_out, some_rows, total_steps
from .pictures import Augment
from .setup import Base, open_base, resolve_precision

TEXT_TOKENS = 128
"""Longest prompt and longest answer of PaliGemma's pretraining."""
Progress = Callable[[str, int, int, str], None]
"""Called with (stage, done, total, message)."""


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of a dataset that a run uses."""

    dataset: Dataset
    rows: NDArray[np.int64]
    """[N]"""
    preflight: Preflight
    """Of the whole dataset."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that can start."""

    config: TrainConfig
    """With its precision resolved."""
    base: Base
    encoder: Encoder
    train: Split
    evaluation: Split | None
    cut_answers: int
    """Answers of the training data that are cut."""
    template: str | None
    """Prompt template that the checkpoint keeps; None: all rows bring whole prompts."""
    per_step: int
    """Rows of an optimizer step, over passes and processes."""
    steps: int
    order: RowOrder
    augment: Augment | None
    data_digest: str
    """Hash of the training rows' texts, answers and picture names."""


def make_plan(
    config: TrainConfig, checkpoint: str, *, world: int, device: torch.device, bad_rows: Path | None, on_progress: Progress
) -> Plan:
    """Open the base model and the data, and look at every row.

    Args:
        config: The run.
        checkpoint: Folder or Hub id of the base model.
        world: Number of processes.
        device: Where it will run.
        bad_rows: File for the rows that cannot be used.
        on_progress: Called while rows are checked.

    Raises:
        InputError: The data cannot be used; rows that cannot be are named unless `skip_bad`.
        TrainError: The base model cannot be used.
    """
    config = dataclasses.replace(config, precision=resolve_precision(config.precision, device))
    if not config.data:
        raise InputError("no training data: give --data, for example a .jsonl file")
    base = open_base(checkpoint)
    config = _lengths(config, base)
    encoder = Encoder(
        base.tokenizer,
        eos_id=base.config.eos_token_id,
        template=config.prompt,
        language=config.language,
        max_prompt_tokens=config.max_prompt_tokens,
        max_answer_tokens=config.max_answer_tokens,
        cut_answers=config.cut_answers,
        cycle=config.answers == "cycle",
    )
    counts = Counter[str]()

    def check_training(record: Record) -> None:
        counts["cut"] += encoder.check(record)
        counts["questions"] += not record.is_prompt

    dataset = open_dataset(config.data, images=_path(config.images), annotations=_path(config.annotations))
    preflight = _look_at(dataset, check_training, config, bad_rows, on_progress)
    rows, held = _divide(dataset, preflight.good, config)
    evaluation = _evaluation(dataset, held, preflight, encoder, config, bad_rows, on_progress)
    per_step = config.batch_size * config.accumulation * world
    return Plan(
        config=config,
        base=base,
        encoder=encoder,
        train=Split(dataset, rows, preflight),
        evaluation=evaluation,
        cut_answers=counts["cut"],
        template=answer_template(config) if counts["questions"] else None,
        per_step=per_step,
        steps=total_steps(len(rows), config.epochs, per_step, config.max_steps),
        order=_order(dataset, rows, config, per_step, world),
        augment=easy_vqa_data.move_easy_vqa if config.augment == "move-shapes" else None,
        data_digest=_digest(dataset, rows),
    )


def _lengths(config: TrainConfig, base: Base) -> TrainConfig:
    """Settle the longest prompt and answer: PaliGemma's 128 where there is room."""
    limit = int(base.config.text_config.max_position_embeddings) - base.num_image_tokens
    usual = min(TEXT_TOKENS, limit // 2)
    prompt, answer = config.max_prompt_tokens or usual, config.max_answer_tokens or usual
    if prompt + answer > limit:
        raise InputError(f"--max-prompt-tokens {prompt} and --max-answer-tokens {answer}: {limit} in all fit this model")
    return dataclasses.replace(config, max_prompt_tokens=prompt, max_answer_tokens=answer)


def answer_template(config: TrainConfig) -> str:
    """The template that questions will have to be put in: a language other than English, where users start, is part of it."""
    return config.prompt if config.language == "en" else config.prompt.replace("{language}", config.language)


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _look_at(
    dataset: Dataset, look: Callable[[Record], None], config: TrainConfig, report: Path | None, on_progress: Progress
) -> Preflight:
    found = check(dataset, look, on_progress=on_progress)
    if found.bad and report is not None:
        found.write_report(report)
    if found.bad and not config.skip_bad:
        first = found.bad[0]
        where = f"; all are in {report}" if report is not None else ""
        raise InputError(
            f"{dataset.name}: {len(found.bad)} of {len(dataset)} rows cannot be used, first row {first.row} "
            f"(question {first.id}): {first.reason}{where}; mend them, or leave them out with --skip-bad"
        )
    if not len(found.good):
        raise InputError(f"{dataset.name} has no row that can be used")
    return found


def _divide(dataset: Dataset, good: NDArray[np.int64], config: TrainConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (training rows, held-out rows)."""
    rows, held = good, good[:0]
    if config.holdout:
        names = [dataset.record(int(row)).picture for row in good]
        number = {name: i for i, name in enumerate(dict.fromkeys(names))}
        out = hold_out(np.array([number[name] for name in names]), config.holdout, config.seed)
        rows, held = good[~out], good[out]
        if not len(held) or not len(rows):
            raise InputError(f"--holdout {config.holdout}: the {len(number)} pictures do not give two parts")
    return some_rows(rows, config.limit, config.seed), held


def _evaluation(
    dataset: Dataset,
    held: NDArray[np.int64],
    preflight: Preflight,
    encoder: Encoder,
    config: TrainConfig,
    bad_rows: Path | None,
    on_progress: Progress,
) -> Split | None:
    if not config.evaluations:
        return None
    if config.holdout:
        return Split(dataset, some_rows(held, config.eval_limit, config.seed), preflight)
    if not config.eval_data:
        return None

    def look(record: Record) -> None:
        encoder.prompt(record)
        if not record.answers:
            raise RowError("there is no answer to compare with")

    other = open_dataset(config.eval_data, images=_path(config.eval_images), annotations=_path(config.eval_annotations))
    report = bad_rows.with_name(f"evaluation-{bad_rows.name}") if bad_rows else None
    found = _look_at(other, look, config, report, on_progress)
    return Split(other, some_rows(found.good, config.eval_limit, config.seed), found)


def _order(dataset: Dataset, rows: NDArray[np.int64], config: TrainConfig, per_step: int, world: int) -> RowOrder:
    if config.order == "epochs":
        return EpochOrder(rows, config.seed, per_step)
    if not config.max_steps or world > 1 or not dataset.name.startswith(("easy-vqa:", "demo:")):
        raise InputError("--order balanced needs demo:train or easy-vqa:train, --max-steps and one process")
    records = [dataset.record(int(row)) for row in rows]
    easy = np.array([record.picture.startswith("easy-vqa/") for record in records])
    pictures, per_picture = per_step // config.questions_per_picture, config.questions_per_picture
    scenes = 0 if easy.all() else round(pictures * SCENE_SHARE)
    balanced = BalancedOrder(
        rows[easy],
        [record for record in records if record.picture.startswith("easy-vqa/")],
        seed=config.seed,
        steps=config.max_steps,
        natural_from=config.natural_from,
        pictures=pictures - scenes,
        per_picture=per_picture,
    )
    if not scenes:
        return balanced
    others = [record for record in records if not record.picture.startswith("easy-vqa/")]
    return MixedOrder(
        balanced, rows[~easy], others, seed=config.seed, steps=config.max_steps, pictures=scenes, per_picture=per_picture
    )


def _digest(dataset: Dataset, rows: NDArray[np.int64]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        record = dataset.record(int(row))
        digest.update(repr((record.id, record.picture, record.text, record.answer, record.answers)).encode())
    return digest.hexdigest()[:16]
