"""pgfast's side: the Trainer of `train/` with the `seed` preset, evaluation left out."""

from __future__ import annotations

from pathlib import Path

import torch
from pgfast.train.distributed import Processes
from pgfast.train.plan import Plan, make_plan
from pgfast.train.presets import resolve
from pgfast.train.run_log import read_steps
from pgfast.train.trainer import Trainer

from .settings import Spec
from .stopwatch import Stopwatch


class _EnoughError(Exception):
    """All steps that count are done."""


def plan(spec: Spec) -> Plan:
    """Return the run as `pgfast train --preset seed` would plan it."""
    values = {
        "model": spec.checkpoint,
        "data": spec.data,
        "precision": "fp32",
        "batch_size": spec.batch_size,
        "accumulation": spec.accumulation,
        "max_steps": spec.steps,
        "evaluations": 0,
        "feature_cache": spec.cache,
        "threads": spec.threads,
        "seed": spec.seed,
    }
    return make_plan(
        resolve("seed", values),
        spec.checkpoint,
        world=1,
        device=torch.device("cpu"),
        bad_rows=None,
        on_progress=lambda stage, done, total, message: None,
    )


def train(spec: Spec, watch: Stopwatch) -> None:
    """Train until the watch has seen enough steps."""
    torch.set_num_threads(spec.threads)

    def on_progress(stage: str, done: int, total: int, message: str) -> None:
        if stage == "training" and watch.step(float("nan")):
            raise _EnoughError

    trainer = Trainer(plan(spec), Path(spec.out), Processes(0, 1, torch.device("cpu")), on_progress)
    watch.loaded()
    try:
        trainer.run()
    except _EnoughError:
        watch.losses[:] = [step["loss"] for step in read_steps(Path(spec.out))]
