"""Several processes: `torchrun` or `accelerate launch` start them, DDP (adapters) or FSDP2 (whole models) joins them."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from pgfast.errors import MissingDependencyError

from .answer_model import AnswerModel

T = TypeVar("T")

SHARDED_BLOCKS = ("GemmaDecoderLayer", "Gemma2DecoderLayer", "SiglipEncoderLayer")
"""Modules that FSDP gathers one at a time; all else is gathered for the whole pass."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and draws progress."""
        return self.rank == 0

    def gather(self, values: list[T]) -> list[T]:
        """Return the lists of all processes as one."""
        if self.world == 1:
            return values
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, values)
        return [item for part in everyone for item in part]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes."""
        if self.world > 1:
            value = value.to(self.device)
            dist.all_reduce(value)
        return value

    def of_first(self, value: T) -> T:
        """Return the first process's value in all of them, for decisions that must not differ by a rounding."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def close(self) -> None:
        """Leave the group, all at the same time, and after the models that hold on to it."""
        if self.world > 1 and dist.is_initialized():
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()


def join() -> Processes:
    """Join the group that the launcher's environment variables describe; alone without them."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingDependencyError("accelerate", "train") from error
    # the variables of a launcher that wants FSDP would make accelerate wrap models itself; only its process group is used here
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    # the others wait while the first one writes a state
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))
    return Processes(state.process_index, state.num_processes, state.device)


def wrap(model: AnswerModel, processes: Processes, *, shard: bool) -> nn.Module:
    """Make the processes train one model: sharded (FSDP2) or as copies (DDP)."""
    model.to(processes.device)
    if processes.world == 1:
        return model
    if not shard:
        devices = [processes.device] if processes.device.type == "cuda" else None
        # buffers are constants, and a process without rows to evaluate would miss their broadcast
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # older torch
        settings: dict[str, Any] = {name: False}
        return nn.parallel.DistributedDataParallel(model, device_ids=devices, **settings)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(processes.device.type, (processes.world,))
    # a frozen vision tower stays whole in every process: it has no gradients, and the feature cache runs it alone
    tower = model.model.model.vision_tower
    whole = set(tower.parameters()) if not any(p.requires_grad for p in tower.parameters()) else set()
    for module in model.modules():
        if type(module).__name__ in SHARDED_BLOCKS and whole.isdisjoint(module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    return model


@contextlib.contextmanager
def gradients_stay(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Keep the gradients of a pass in this process: of adapters only the last pass of a step exchanges them.

    Sharded models exchange them in every pass: else each process would hold those of the whole model.
    """
    with model.no_sync() if wanted and isinstance(model, nn.parallel.DistributedDataParallel) else contextlib.nullcontext():
        yield
