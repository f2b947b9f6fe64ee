"""The model card of a run, in the form that transformers' Trainer writes, with nothing left open."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from torch import nn

from .plan import Plan, Split
from .run_log import Evaluated, read_evaluations
from .setup import count_parameters

_VERSIONS = ("pgfast", "transformers", "torch", "peft", "bitsandbytes", "accelerate", "tokenizers")


def write_card(folder: Path, plan: Plan, model: nn.Module, run: Path, world: int, stopped_at: int | None = None) -> None:
    """Write `README.md` into a checkpoint.

    Args:
        folder: The checkpoint.
        plan: The run.
        model: What was trained, for the counts.
        run: Folder of the run, with its evaluations.
        world: Number of processes.
        stopped_at: Last step of a run that stopped early.
    """
    evaluations = read_evaluations(run)
    name = run.name if plan.config.method == "full" else f"{run.name} (LoRA adapter)"
    sections = [
        _header(plan),
        f"# {name}",
        _summary(plan, evaluations),
        "## Prompt\n\n" + _prompt(plan),
        "## How to use it\n\n" + _usage(plan),
        "## Training and evaluation data\n\n" + _data(plan),
        "## Training procedure\n\n### Training hyperparameters\n\n" + _hyperparameters(plan, world, stopped_at),
        "### Parameters\n\n" + _parameters(model),
        "### Training results\n\n" + _results(evaluations, plan),
        "### Framework versions\n\n" + "\n".join(f"- {package} {_version(package)}" for package in _VERSIONS),
    ]
    partial = folder / ".README.md.partial"
    partial.write_text("\n\n".join(sections) + "\n")
    partial.replace(folder / "README.md")


def _header(plan: Plan) -> str:
    library = "transformers" if plan.config.method == "full" else "peft"
    lines = ["---", f"library_name: {library}", "pipeline_tag: image-text-to-text"]
    # a local folder's name is no Hub id, and the Hub refuses a card that says it is; its licence is not known either
    if plan.base.revision is not None:
        lines += ["license: gemma", f"base_model: {plan.base.name}"]
    tags = ["generated_from_trainer", "paligemma", "pgfast", *([] if library == "transformers" else ["lora"])]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _summary(plan: Plan, evaluations: list[Evaluated]) -> str:
    revision = f" at revision {plan.base.revision}" if plan.base.revision else ""
    text = f"This model is a fine-tuned version of {plan.base.name}{revision} on {plan.train.dataset.name}."
    if not evaluations:
        return f"{text} It was not evaluated."
    best = max(evaluations, key=lambda e: (e.accuracy, -e.loss))
    assert plan.evaluation is not None
    where = plan.evaluation.dataset.name
    figure = f"a VQA accuracy of {best.accuracy:.2%} on {best.count:,} questions of {where}, which also chose it"
    return f"{text} These are the weights of step {best.step}, its best evaluation: {figure}."


def _prompt(plan: Plan) -> str:
    if plan.template is None:
        return "The training data brings whole prompts, without a template: ask with `pgfast generate` in the same form."
    template = plan.template
    return f"Questions were put into the template `{template}`, which `pgfast_prompts.json` keeps; a newline ends the prompt."


def _usage(plan: Plan) -> str:
    if plan.config.method == "full":
        export = "pgfast export THIS_FOLDER bundle --precision int8"
    else:
        export = f"pgfast export {plan.base.name} bundle --adapter THIS_FOLDER --precision int8"
    return f'```\n{export}\npgfast answer picture.jpg "what is this?" -m bundle\n```'


def _data(plan: Plan) -> str:
    lines = [f"- training: {_split(plan.train)}; {len(plan.train.preflight.bad)} rows could not be used"]
    if plan.cut_answers:
        lines.append(f"- {plan.cut_answers} answers were cut to {plan.config.max_answer_tokens} tokens")
    if plan.evaluation is None:
        lines.append("- evaluation: none")
    else:
        lines.append(f"- evaluation: {_split(plan.evaluation)}")
    if plan.config.holdout:
        lines.append(f"- {plan.config.holdout:.1%} of the pictures were kept for evaluation, and none of them was trained on")
    return "\n".join(lines)


def _split(split: Split) -> str:
    return f"{len(split.rows):,} of the {len(split.dataset):,} rows of {split.dataset.name}"


def _hyperparameters(plan: Plan, world: int, stopped_at: int | None) -> str:
    c, name = plan.config, "AdamW" if plan.config.weight_decay else "Adam"
    rows: dict[str, Any] = {
        "learning_rate": c.learning_rate,
        "train_batch_size": c.batch_size,
        "eval_batch_size": c.eval_batch_size,
        "seed": c.seed,
        **({"distributed_type": "multi-process", "num_processes": world} if world > 1 else {}),
        "gradient_accumulation_steps": c.accumulation,
        "total_train_batch_size": plan.per_step,
        "optimizer": f"{name} with betas=({c.adam_beta1:g},{c.adam_beta2:g}) and epsilon={c.adam_epsilon:g}",
        "weight_decay": c.weight_decay,
        "max_grad_norm": c.clip_norm,
        "lr_scheduler_type": c.schedule,
        "lr_scheduler_warmup_steps": c.warmup_steps or round(c.warmup_fraction * plan.steps),
        "num_epochs": round(plan.steps * plan.per_step / len(plan.train.rows), 4) if c.max_steps else c.epochs,
        "num_steps": f"{stopped_at} of {plan.steps}, stopped early" if stopped_at else plan.steps,
        "mixed_precision": c.precision,
        "method": c.method,
        "frozen": "everything but the adapters" if c.method != "full" else c.freeze or "nothing",
        **({"base_quantization": "nf4, double quantization"} if c.method == "qlora" else {}),
        **(
            {"lora_rank": c.lora_rank, "lora_alpha": c.lora_alpha, "lora_dropout": c.lora_dropout} if c.method != "full" else {}
        ),
        "answers": c.answers,
        "loss": f"cross entropy of the answer and its end, mean per {c.loss_reduction}",
        "preset": c.preset,
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in rows.items())
    return f"The following hyperparameters were used during training:\n{lines}"


def _parameters(model: nn.Module) -> str:
    lines = ["| tower | trainable | all |", "|---|---|---|"]
    counts = count_parameters(model)
    for tower, (trainable, total) in counts.items():
        lines.append(f"| {tower} | {trainable:,} | {total:,} |")
    return "\n".join(lines)


def _results(evaluations: list[Evaluated], plan: Plan) -> str:
    if not evaluations:
        return "Not evaluated during training."
    types = sorted({name for e in evaluations for name in e.by_type})
    head = ["Training Loss", "Epoch", "Step", "Validation Loss", "VQA Accuracy", *types]
    lines = [f"| {' | '.join(head)} |", "|" + ":---:|" * len(head)]
    for e in evaluations:
        cells = [f"{e.training_loss:.4f}", f"{e.epoch:.4f}", str(e.step), f"{e.loss:.4f}", f"{e.accuracy:.4f}"]
        lines.append(f"| {' | '.join([*cells, *(f'{e.by_type[name]:.4f}' if name in e.by_type else '' for name in types)])} |")
    return "\n".join(lines) + "\n\nAccuracy is the official VQA accuracy of greedy answers, 0 to 1."


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
