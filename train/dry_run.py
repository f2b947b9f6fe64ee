"""`--dry-run`: everything a run would do before its first step, shown."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from . import state
from .batches import encode_rows
from .config import TrainConfig
from .distributed import Processes
from .estimate import Estimate, estimate
from .plan import Plan, Progress, make_plan
from .run import base_checkpoint
from .sequence import Example, prefix_lm_mask
from .setup import build, count_parameters
from .trainer import STATES, cursor_of

SHOWN = 4
"""Examples of the first batch that are decoded."""


def rehearse(config: TrainConfig, out: Path | None, processes: Processes, on_progress: Progress) -> str:
    """Check a run and describe it.

    Args:
        config: The run.
        out: Its folder: whether it holds another run is checked, nothing is written there.
        processes: This process among the others.
        on_progress: Called while data is checked.

    Returns:
        Text: the data, the first batch decoded, its attention mask, trainable parameters per tower, memory and time.

    Raises:
        InputError: As the run itself would.
        TrainError: As the run itself would.
    """
    with tempfile.TemporaryDirectory() as scratch:
        small = dataclasses.replace(config, tower_steps=1) if config.model == "tiny" else config
        place = out if out is not None and (out / "base").exists() else Path(scratch)
        checkpoint = base_checkpoint(small, place, on_progress)
        plan = make_plan(
            config, checkpoint, world=processes.world, device=processes.device, bad_rows=None, on_progress=on_progress
        )
        if out is not None and (found := state.newest(out / STATES)):
            state.check(state.read_cursor(found), cursor_of(plan, processes.world), out)
        trainee = build(plan.config, plan.base, on_meta=True)
        counts = count_parameters(trainee.answer_model)
        examples = _first_batch(plan)
        reckoned = estimate(plan, counts, examples, processes)
        parts = [_data(plan), _batch(plan, examples), _mask(plan, examples[0]), _towers(counts), _reckoned(plan, reckoned)]
    return "\n\n".join(parts)


def _first_batch(plan: Plan) -> list[Example]:
    rows, epochs = (part[: plan.config.batch_size] for part in plan.order.draw(0))
    return encode_rows(plan.encoder, plan.train.dataset, rows, epochs, plan.config.seed)


def _data(plan: Plan) -> str:
    c, train = plan.config, plan.train
    lines = [
        f"preset {c.preset}, method {c.method}, arithmetic {c.precision}, base {plan.base.name}",
        f"training data: {len(train.rows):,} of {len(train.dataset):,} rows of {train.dataset.name}, "
        f"{len(train.preflight.bad)} unusable, {plan.cut_answers} answers cut",
        "evaluation data: "
        + ("none" if plan.evaluation is None else f"{len(plan.evaluation.rows):,} rows of {plan.evaluation.dataset.name}"),
        f"{plan.steps:,} steps of {plan.per_step} rows = {plan.steps * plan.per_step / len(train.rows):.2f} epochs",
    ]
    return "\n".join(lines)


def _batch(plan: Plan, examples: list[Example]) -> str:
    """Decode the first examples from their ids, markers included, as the model will see them."""
    decode = plan.base.tokenizer.decode_with_markers
    lines = [f"first batch ({len(examples)} rows, | is where the answer begins and the loss with it):"]
    image = f"<image> x {plan.base.num_image_tokens}"
    lines += [f"  {image} {decode(example.prefix)!r} | {decode(example.suffix)!r}" for example in examples[:SHOWN]]
    labels = [len(example.suffix) for example in examples]
    ends = sum(example.suffix[-1] == plan.encoder.eos_id for example in examples)
    longest = plan.base.num_image_tokens + max(len(e.prefix) + len(e.suffix) for e in examples)
    lines.append(
        f"label tokens: {sum(labels)} ({min(labels)} to {max(labels)} per row), longest sequence {longest}, "
        f"rows with <eos>: {ends} of {len(examples)}"
    )
    return "\n".join(lines)


def _mask(plan: Plan, example: Example) -> str:
    """Draw which position may attend to which; the image is shown as its first and last token."""
    image, prefix, suffix = plan.base.num_image_tokens, len(example.prefix), len(example.suffix)
    size = image + prefix + suffix
    mask = prefix_lm_mask(np.array([image + prefix]), np.array([size]), size)[0]  # [L, L]
    shown = [0, image - 1, *range(image, size)]
    names = ["image", "image", *["prompt"] * prefix, *["answer"] * suffix]
    lines = ["attention of the first row (rows attend to columns; the image is shown by its first and last token):"]
    lines.append(" " * 10 + "".join(name[0] for name in names))
    lines += [f"  {name:8}" + "".join("#" if mask[q, k] else "." for k in shown) for q, name in zip(shown, names, strict=True)]
    return "\n".join(lines)


def _towers(counts: dict[str, tuple[int, int]]) -> str:
    lines = ["parameters:     trainable            all"]
    lines += [f"  {tower:10}{trainable:>15,}{total:>15,}" for tower, (trainable, total) in counts.items()]
    lines.append(f"  {'together':10}{sum(t for t, _ in counts.values()):>15,}{sum(a for _, a in counts.values()):>15,}")
    return "\n".join(lines)


def _reckoned(plan: Plan, e: Estimate) -> str:
    gb = 1e9
    rows = {
        "weights": e.weights,
        "gradients": e.gradients,
        "optimizer": e.optimizer,
        "activations": e.activations,
        "logits": e.logits,
        "temporaries": e.temporaries,
    }
    lines = [f"memory, reckoned for one process: {e.total / gb:.2f} GB"]
    lines.append("  " + ", ".join(f"{name} {value / gb:.2f}" for name, value in rows.items()))
    lines.append(f"arithmetic: {e.flops_per_step / 1e12:.3f} TFLOP a step and process")
    rate = f"{e.flops_per_second / 1e9:,.0f} GFLOP/s, measured here on one product"
    lines.append(
        f"time, at the least: {e.seconds_per_step:.2f} s a step, {e.seconds_per_step * plan.steps / 3600:.2f} h in all ({rate})"
    )
    return "\n".join(lines)
