"""The result of a run: a normal Hugging Face folder, or a normal PEFT adapter, with its prompt and its card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pgfast.export.checkpoint import PROMPTS_FILE
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pgfast.errors import TrainError

from .distributed import Processes
from .model_card import write_card
from .plan import Plan
from .setup import Trainee

_COPIED = ("tokenizer*", "special_tokens_map.json", "preprocessor_config.json", "processor_config.json", "added_tokens.json")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def write_checkpoint(folder: Path, plan: Plan, trainee: Trainee, model: nn.Module, processes: Processes) -> None:
    """Write the checkpoint beside the old one and swap them; every process calls it, the first one writes.

    Args:
        folder: Where it will be.
        plan: The run.
        trainee: Model and adapters.
        model: The same, wrapped for several processes.
        processes: This process among the others.

    Raises:
        TrainError: The disk is full or cannot be written; the old checkpoint is still there.
    """
    whole: dict[str, Any] | None = None
    if trainee.peft is None:  # sharded weights are put together by all processes
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=processes.world > 1))
    if not processes.is_main:
        return
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    try:
        if old.exists() and not folder.exists():  # a kill between the two renames
            os.replace(old, folder)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        if trainee.peft is not None:
            # a folder of the Hub's cache means nothing on another machine
            named = plan.base.name if plan.base.revision else str(plan.base.path)
            trainee.peft.peft_config["default"].base_model_name_or_path = named
            trainee.peft.save_pretrained(partial, save_embedding_layers=False)
        else:
            assert whole is not None
            dtype = _stored_dtype(plan.base.path)
            # a tied head is the embedding: cast or gathered they would be two, and both be written
            tied = trainee.model.lm_head.weight is trainee.model.get_input_embeddings().weight
            names = {name: name.removeprefix("model.") for name in whole}
            tensors = {n: whole[name].detach().to(dtype) for name, n in names.items() if not (tied and n == "lm_head.weight")}
            trainee.model.config.dtype = dtype
            trainee.model.save_pretrained(partial, state_dict=tensors)
            for pattern in _COPIED:
                for file in plan.base.path.glob(pattern):
                    shutil.copyfile(file, partial / file.name)
        if plan.template is not None:
            (partial / PROMPTS_FILE).write_text(json.dumps({"answer": plan.template}) + "\n")
        write_card(partial, plan, trainee.answer_model, folder.parent, processes.world)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise TrainError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def renew_card(folder: Path, plan: Plan, trainee: Trainee, processes: Processes, step: int) -> None:
    """Write the card of a checkpoint again, with the evaluations that came after it.

    Raises:
        TrainError: The disk is full or cannot be written.
    """
    if not processes.is_main:
        return
    try:
        stopped_at = step if step < plan.steps else None
        write_card(folder, plan, trainee.answer_model, folder.parent, processes.world, stopped_at)
    except OSError as error:
        raise TrainError(f"the card of {folder} cannot be written: {error.strerror}") from error


def _stored_dtype(base: Path) -> torch.dtype:
    """The type that the base model is stored in: fp32 masters are rounded to it once, at the end."""
    with safe_open(min(base.glob("*.safetensors")), framework="pt") as file:
        stored = file.get_slice(next(iter(file.keys()))).get_dtype()
    return _DTYPES.get(stored, torch.float32)
