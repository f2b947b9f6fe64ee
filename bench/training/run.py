"""The whole measurement: models and data once, then the variants in turns, each in a fresh process; all into one JSON file."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pgfast.export.config import read_config

from pgfast.errors import InputError, PgfastError

from .. import machine
from ..cost import Cost
from .models import MODELS, Dimensions, make_checkpoint, parameters, step_flops
from .pictures import make_data, words
from .settings import CACHED, FILLING, PUBLIC, VARIANTS, Spec

FORMAT = "training 1"
PICTURES = 100
"""Five questions each: enough that a run of a few steps sees few pictures twice, as in an epoch of VQAv2."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured, and for how long."""

    models: Sequence[str]
    work: Path
    """For checkpoints, data and caches; what is there is used again."""
    rounds: int
    warmup: int
    counted: int
    batch_size: int
    accumulation: int
    threads: int


def measure(settings: Settings, out: Path, say: Say = lambda line: None) -> dict[str, Any]:
    """Measure and write `out`, anew after every process.

    Args:
        settings: What to measure.
        out: The JSON file.
        say: Called with a line of progress.

    Returns:
        The content of the file.

    Raises:
        InputError: A model is unknown, or the steps need more rows than there are.
        MissingDependencyError: torch or transformers are not installed.
        PgfastError: A process failed.
    """
    if unknown := sorted(set(settings.models) - set(MODELS)):
        raise InputError(f"unknown model {unknown[0]!r}: choose from {', '.join(MODELS)}")
    per_step = settings.batch_size * settings.accumulation
    if (settings.warmup + settings.counted + 1) * per_step > 5 * PICTURES:
        raise InputError(f"--warmup and --steps: there are {5 * PICTURES} rows, a step takes {per_step}")
    data: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "settings": {k: v for k, v in asdict(settings).items() if k != "work"} | {"precision": "fp32"},
        "models": [],
        "samples": [],
    }
    for name in settings.models:
        _measure_model(MODELS[name], settings, data, out, say)
    return data


def _measure_model(d: Dimensions, settings: Settings, data: dict[str, Any], out: Path, say: Say) -> None:
    settings.work.mkdir(parents=True, exist_ok=True)
    rows = make_data(settings.work / f"pictures-{PICTURES}", PICTURES)
    checkpoint = settings.work / f"{d.name}-{d.digest()}"
    make_checkpoint(d, words(rows), checkpoint)
    cost = Cost(read_config(checkpoint / "config.json"))
    with tempfile.TemporaryDirectory(dir=settings.work) as scratch:
        spec = Spec(
            variant="",
            checkpoint=str(checkpoint),
            data=str(rows),
            out=f"{scratch}/run",
            cache="",
            threads=settings.threads,
            batch_size=settings.batch_size,
            accumulation=settings.accumulation,
            warmup=settings.warmup,
            counted=settings.counted,
        )
        positions, answer_tokens = _lengths(spec)
        data["models"].append(
            {
                "name": d.name,
                "dimensions": asdict(d),
                "parameters": parameters(checkpoint),
                "positions": positions,
                "answer_tokens": answer_tokens,
                "forward_flops": {
                    "vision": cost.vision_flops(),
                    "language": cost.prefill_flops(round(positions)) - 2.0 * cost.head_params,
                    "head": 2.0 * cost.head_params * positions,
                },
                "step_flops": step_flops(cost, positions, answer_tokens),
            }
        )
        cached = f"{scratch}/features"
        turns = [(FILLING, 0), *((variant, number) for number in range(settings.rounds) for variant in VARIANTS)]
        for variant, number in turns:
            one = replace(spec, variant=variant, cache=cached if variant in (FILLING, CACHED) else "")
            sample: dict[str, Any] = {"model": d.name, "variant": variant, "round": number} | run_one(one)
            data["samples"].append(sample)
            rate = len(sample["seconds"]) * settings.batch_size * settings.accumulation / sum(sample["seconds"])
            say(f"{d.name}, round {number + 1}: {variant} {rate:.3f} samples/s")
            _write(data, out)


def run_one(spec: Spec) -> dict[str, Any]:
    """Run a variant in a process of its own and return what `Stopwatch.result` says there.

    Raises:
        PgfastError: It failed; the message is the last line of its errors.
    """
    shutil.rmtree(spec.out, ignore_errors=True)
    Path(spec.out).mkdir(parents=True)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = os.environ | {name: str(spec.threads) for name in names} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pgfast.bench.training.worker", json.dumps(asdict(spec))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        killed = "it was killed, most likely for memory" if done.returncode == -9 else f"it ended with code {done.returncode}"
        raise PgfastError(f"{spec.variant} did not train: {lines[-1][:300] if lines else killed}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _lengths(spec: Spec) -> tuple[float, float]:
    """Mean positions and answer tokens of the rows that are trained on."""
    from .our_trainer import plan

    planned = plan(replace(spec, variant=PUBLIC))
    rows = [int(row) for step in range(spec.steps - 1) for row in planned.order.draw(step)[0]]
    examples = [planned.encoder(planned.train.dataset.record(row)) for row in rows]
    answers = sum(len(example.suffix) for example in examples) / len(examples)
    return planned.base.num_image_tokens + sum(len(e.prefix) for e in examples) / len(examples) + answers, answers


def _write(data: dict[str, Any], out: Path) -> None:
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(out)
