"""What a training run is made of: one dataclass; every value is a flag of `pgfast train`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from pgfast.errors import InputError

TOWERS = ("vision", "projector", "language")


def _value(default: Any, text: str, *, one_of: tuple[str, ...] = (), low: float | None = None, free: bool = False) -> Any:
    """Give a value its default, the help text of its flag, what is allowed, and whether a resumed run may change it."""
    return dataclasses.field(default=default, metadata={"help": text, "one_of": one_of, "low": low, "free": free})


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A run. Presets (`presets.py`) change the defaults."""

    preset: str = _value("", "Where the values came from.", free=True)

    model: str = _value("", "Base model: a Hugging Face folder or Hub id; 'tiny' makes the demo model's base.")
    method: str = _value("full", "What is trained.", one_of=("full", "lora", "qlora"))
    freeze: str = _value("", "Towers that stay as they are, separated by commas: vision, projector, language.")
    lora_rank: int = _value(8, "Rank of the LoRA matrices.", low=1)
    lora_alpha: float = _value(8.0, "LoRA update is scaled by alpha / rank.", low=0)
    lora_dropout: float = _value(0.0, "Dropout in front of the LoRA matrices.", low=0)
    precision: str = _value(
        "auto",
        "Of the arithmetic: bf16 (masters stay fp32) or fp32; auto: bf16 where the device has it.",
        one_of=("auto", "bf16", "fp32"),
    )
    attention: str = _value("sdpa", "Attention of transformers.", one_of=("sdpa", "eager"), free=True)
    gradient_checkpointing: bool = _value(
        False, "Keep no activations inside layers: less memory, a third more time.", free=True
    )

    data: str = _value("", "Training data: JSONL, VQAv2 questions, a folder, a Hub id, easy-vqa:train.")
    images: str = _value("", "Folder of its pictures, where the data does not say it.")
    annotations: str = _value("", "VQAv2 annotations, where they do not lie beside the questions.")
    limit: int = _value(0, "Use only so many rows, drawn by the seed; 0: all.", low=0)
    eval_data: str = _value("", "Data to evaluate on; without it --holdout.")
    eval_images: str = _value("", "Folder of its pictures.")
    eval_annotations: str = _value("", "Its VQAv2 annotations.")
    eval_limit: int = _value(0, "Evaluate on so many rows, drawn by the seed; 0: all.", low=0, free=True)
    holdout: float = _value(0.0, "Share of the training pictures kept for evaluation, with their questions.", low=0)
    skip_bad: bool = _value(False, "Leave out rows that cannot be used, after naming them in a report.", free=True)
    prompt: str = _value("answer {language} {text}", "Template around a question; kept with the checkpoint.")
    language: str = _value("en", "What {language} becomes.")
    answers: str = _value(
        "most-common", "Which of several answers is taught: the most common, or each in turn.", one_of=("most-common", "cycle")
    )
    max_prompt_tokens: int = _value(0, "Longest prompt; longer ones are bad rows; 0: 128, or what fits the model.", low=0)
    max_answer_tokens: int = _value(0, "Longest answer, end included; longer ones are bad rows; 0: likewise.", low=0)
    cut_answers: bool = _value(False, "Cut longer answers instead (then without an end).")
    order: str = _value(
        "epochs",
        "epochs: every row once per epoch; balanced: by kind of question (easy-VQA only).",
        one_of=("epochs", "balanced"),
    )
    questions_per_picture: int = _value(4, "With --order balanced: questions drawn about one picture.", low=1)
    natural_from: float = _value(0.7, "With --order balanced: share of the run from which the mix is the natural one.", low=0)
    augment: str = _value("none", "move-shapes: the demo's, for pictures of one shape.", one_of=("none", "move-shapes"))

    seed: int = _value(42, "Of order, held-out pictures, adapters and dropout.", low=0)
    epochs: float = _value(10.0, "Times through the data.", low=0)
    max_steps: int = _value(0, "Stop there instead; 0: after the epochs.", low=0)
    batch_size: int = _value(4, "Rows per process and pass.", low=1)
    accumulation: int = _value(4, "Passes per optimizer step.", low=1)
    learning_rate: float = _value(2e-5, "Peak learning rate.", low=0)
    schedule: str = _value("linear", "After the warm-up.", one_of=("linear", "cosine", "constant"))
    warmup_steps: int = _value(0, "Steps of linear warm-up.", low=0)
    warmup_fraction: float = _value(0.0, "The same as a share of the run.", low=0)
    adam_beta1: float = _value(0.9, "Adam.", low=0)
    adam_beta2: float = _value(0.999, "Adam.", low=0)
    adam_epsilon: float = _value(1e-8, "Adam.", low=0)
    weight_decay: float = _value(0.0, "Decoupled, on matrices other than embeddings.", low=0)
    clip_norm: float = _value(1.0, "Largest gradient norm; 0: no clipping.", low=0)
    loss_reduction: str = _value(
        "token", "Mean over the answer tokens of a step, or over its examples.", one_of=("token", "example")
    )

    eval_batch_size: int = _value(8, "Rows per pass while evaluating.", low=1, free=True)
    evaluations: int = _value(4, "Evaluations, evenly spread, the last one at the end; 0: none.", low=0, free=True)
    patience: int = _value(0, "Stop after so many evaluations that were not the best; 0: never.", low=0, free=True)
    max_new_tokens: int = _value(32, "Longest answer while evaluating.", low=1, free=True)

    tower_steps: int = _value(1100, "With --model tiny: steps of its vision tower alone.", low=1)
    tower_batch: int = _value(128, "With --model tiny: pictures per step of the tower.", low=1)
    tower_learning_rate: float = _value(1e-3, "With --model tiny: of the tower.", low=0)

    feature_cache: str = _value("", "Folder that keeps the frozen vision tower's output, 0.6 MB per picture at 224.", free=True)
    save_every: int = _value(500, "Steps between two states to continue from.", low=1, free=True)
    threads: int = _value(0, "CPU threads; 0: torch's own choice.", low=0, free=True)
    workers: int = _value(2, "Threads that prepare pictures ahead.", low=1, free=True)

    def __post_init__(self) -> None:
        """Refuse what cannot be a run; the message names the flag."""
        for field in dataclasses.fields(self):
            value, low, one_of = getattr(self, field.name), field.metadata["low"], field.metadata["one_of"]
            if one_of and value not in one_of:
                raise InputError(f"{flag(field.name)} is {value!r}: one of {', '.join(one_of)}")
            if low is not None and not low <= value < float("inf"):
                raise InputError(f"{flag(field.name)} is {value}: at least {low:g} is needed")
        for name in ("holdout", "lora_dropout", "adam_beta1", "adam_beta2", "warmup_fraction"):
            if getattr(self, name) >= 1:
                raise InputError(f"{flag(name)} is {getattr(self, name)}: less than 1 is needed")
        if not self.max_steps and not self.epochs:
            raise InputError("--epochs is 0 and --max-steps is not given: nothing would be trained")
        if unknown := [tower for tower in self.frozen if tower not in TOWERS]:
            raise InputError(f"--freeze names {unknown[0]!r}: only {', '.join(TOWERS)} are known")
        if self.method == "full" and set(self.frozen) == set(TOWERS):
            raise InputError("--freeze names every tower: nothing would be trained")
        if self.method != "full" and "language" in self.frozen:
            raise InputError(f"--freeze names the language model, where --method {self.method} puts its adapters")
        if self.warmup_steps and self.warmup_fraction:
            raise InputError("--warmup-steps and --warmup-fraction exclude each other")
        if "{text}" not in self.prompt:
            raise InputError("--prompt has no {text}: the question would be left out")
        if "\n" in self.prompt:
            raise InputError("--prompt holds a newline: pgfast adds the one that ends the prompt")
        if self.feature_cache and (self.augment != "none" or not self.vision_frozen):
            raise InputError(
                "--feature-cache needs a frozen vision tower and pictures without --augment: features would change"
            )
        if self.holdout and self.eval_data:
            raise InputError("--holdout and --eval-data exclude each other")
        if self.holdout and not self.evaluations:
            raise InputError("--holdout keeps pictures for evaluations and --evaluations is 0: change one of them")
        if self.order == "balanced" and self.batch_size % self.questions_per_picture:
            raise InputError("--batch-size has to be a multiple of --questions-per-picture")

    @property
    def frozen(self) -> tuple[str, ...]:
        """Towers named by `freeze`."""
        return tuple(part.strip() for part in self.freeze.split(",") if part.strip())

    @property
    def vision_frozen(self) -> bool:
        """Whether the vision tower stays as it is; adapters are put into the language model only."""
        return self.method != "full" or "vision" in self.frozen

    def digest(self) -> str:
        """Hash of the values that a resumed run must share with the run it continues."""
        return hashlib.sha256(json.dumps(self.fixed(), sort_keys=True).encode()).hexdigest()[:16]

    def fixed(self) -> dict[str, Any]:
        """Values that decide what is learned."""
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields if not field.metadata["free"]}


def flag(name: str) -> str:
    """Name of a value on the command line."""
    return "--" + name.replace("_", "-")


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Say in words what differs between two `TrainConfig.fixed()`."""
    names = [name for name in {**new, **old} if name not in old or name not in new or old[name] != new[name]]
    return ", ".join(f"{flag(name)} was {old.get(name)!r} and is {new.get(name)!r}" for name in names)
