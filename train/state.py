"""The state of a run on disk, from which it continues as if it had never stopped: weights, optimizer, random state, step.

One folder per state, written beside the old one and renamed, so that a kill at any moment leaves a whole one. Tensors are
safetensors, the rest is JSON: nothing here can run code when it is read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from pgfast.errors import TrainError

from .config import difference

FORMAT = 1
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SEPARATOR = "|"
"""Between a parameter's name and what the optimizer keeps for it."""
_RNG, _CUDA_RNG = "rng.{}", "cuda_rng.{}"


@dataclass(frozen=True, slots=True)
class Cursor:
    """What a state says besides tensors."""

    step: int
    """Optimizer steps done; rows, learning rate and augmentation follow from it."""
    fixed: dict[str, Any]
    """`TrainConfig.fixed`."""
    base: str
    """`Base.fingerprint`."""
    data: str
    """Hash of the training rows."""
    world: int
    """Number of processes."""
    best: list[float] | None
    """Accuracy, loss and step of the checkpoint's evaluation."""
    since_best: int
    """Evaluations since then."""
    evaluated: int
    """Step of the last evaluation."""


def save(folder: Path, cursor: Cursor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write `folder/step-N` and remove older states; every process calls it, the first one writes.

    Args:
        folder: `state` in the run's folder.
        cursor: Where the run is.
        model: What is trained, wrapped or not.
        optimizer: Its optimizer.

    Raises:
        TrainError: The disk is full or cannot be written; older states are still there.
    """
    weights = _trainable(model)
    kept: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    rng = _all_random_states()
    if dist.is_initialized() and dist.get_rank():
        return
    # its settings are not kept: they follow from the configuration and the step
    tensors = {
        f"{name}{_SEPARATOR}{what}": tensor.contiguous()
        for name, state in kept["state"].items()
        for what, tensor in state.items()
    }
    raw = {"format": FORMAT, **{name: getattr(cursor, name) for name in Cursor.__slots__}}
    final = folder / f"step-{cursor.step:08d}"
    partial = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(weights, partial / "weights.safetensors")
        save_file(tensors, partial / "optimizer.safetensors")
        save_file(rng, partial / "random.safetensors")
        (partial / "state.json").write_text(json.dumps(raw))
        for file in (*partial.iterdir(), partial):
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TrainError(
            f"the state of step {cursor.step} cannot be written to {folder}: {reason}; free some space and run again"
        ) from error
    for old in folder.glob("step-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """Return the last whole state, or None."""
    return max(folder.glob("step-*"), default=None)


def read_cursor(state: Path) -> Cursor:
    """Read what a state says besides tensors.

    Raises:
        TrainError: It is damaged or of another version.
    """
    try:
        raw = json.loads((state / "state.json").read_text())
        if raw["format"] != FORMAT:
            raise TrainError(f"{state} was written by another version of pgfast: start again in another folder")
        return Cursor(**{name: raw[name] for name in Cursor.__slots__})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{state} is damaged: remove it to start again") from error


def check(cursor: Cursor, wanted: Cursor, out: Path) -> None:
    """Make sure that a state belongs to the run that wants to go on from it.

    Raises:
        TrainError: It does not; the message says what differs.
    """
    way_out = f"choose another --out, or remove {out}"
    if cursor.fixed != wanted.fixed:
        raise TrainError(f"{out} holds another run: {difference(cursor.fixed, wanted.fixed)}; {way_out}")
    if cursor.base != wanted.base:
        raise TrainError(f"{out} was trained from other weights than the base model holds now; {way_out}")
    if cursor.data != wanted.data:
        raise TrainError(f"{out} was trained on other rows than the data holds now; {way_out}")
    if cursor.world != wanted.world:
        raise TrainError(f"{out} ran with {cursor.world} processes, this is {wanted.world}; {way_out}")


def load(state: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a state's tensors into model, optimizer and random generators.

    Raises:
        TrainError: The state is damaged, or belongs to another model.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    kept: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    try:
        weights: dict[str, Any] = load_file(state / "weights.safetensors")
        for key, tensor in load_file(state / "optimizer.safetensors").items():
            name, what = key.rsplit(_SEPARATOR, 1)
            kept[name][what] = tensor
        rng = load_file(state / "random.safetensors")
    except (OSError, SafetensorError, ValueError) as error:
        raise TrainError(f"{state} is damaged: remove it to start again") from error
    if set(weights) != set(_trainable_names(model)):
        raise TrainError(f"{state} belongs to another model: its weights have other names")
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))
    # of this process: only the groups are used, and a gathered whole would exist in the first process alone
    settings: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, settings | {"state": dict(kept)}, options=_WHOLE)
    if _RNG.format(rank) in rng:
        torch.set_rng_state(rng[_RNG.format(rank)])
    if _CUDA_RNG.format(rank) in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng[_CUDA_RNG.format(rank)])


def _trainable_names(model: nn.Module) -> list[str]:
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return [name for name, parameter in inner.named_parameters() if parameter.requires_grad]


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    whole: dict[str, Any] = get_model_state_dict(model, options=options)
    # a tied matrix has two names in the state dict and one among the parameters
    return {name: whole[name].detach().contiguous() for name in _trainable_names(model) if name in whole}


def _all_random_states() -> dict[str, torch.Tensor]:
    mine = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    states = {}
    for rank, state in enumerate(everyone):
        states[_RNG.format(rank)] = state["cpu"]
        if "cuda" in state:
            states[_CUDA_RNG.format(rank)] = state["cuda"]
    return states


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
