"""Waiting times around the engine: import, a whole command, a warm answer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import pgfast
from pgfast.loading import demo_bundle
from pgfast.runtime.providers import import_onnxruntime

from .machine import cpuinfo

PICTURE = demo_bundle().parent / "blue_circle.png"
QUESTION = "what color is the shape?"


def measure(bundle: str | None, runs: int) -> dict[str, Any]:
    """Time the three, each after one uncounted run.

    Args:
        bundle: Bundle folder; None: the embedded one.
        runs: Counted runs of each whole process; the warm answer gets ten times as many.

    Returns:
        Machine, versions, and milliseconds (median, p90, min, n) by name.
    """
    onnxruntime = import_onnxruntime()

    engine = pgfast.load(bundle)
    answer = [sys.executable, "-m", "pgfast", "answer", str(PICTURE), QUESTION]
    commands: dict[str, Callable[[], object]] = {
        'python -c "pass"': lambda: _process([sys.executable, "-c", "pass"]),
        'python -c "import pgfast"': lambda: _process([sys.executable, "-c", "import pgfast"]),
        "pgfast answer (whole process)": lambda: _process(answer + (["-m", bundle] if bundle else [])),
    }
    rows = {name: _row(command, runs) for name, command in commands.items()}
    rows["Engine.answer (warm, file to text)"] = _row(lambda: engine.answer(PICTURE, QUESTION), runs * 10)
    return {
        "machine": f"{cpuinfo().get('model name', 'unknown processor')}, {os.cpu_count()} cores",
        "pgfast": pgfast.__version__,
        "onnxruntime": onnxruntime.__version__,
        "provider": engine.provider,
        "milliseconds": rows,
    }


def _process(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _row(command: Callable[[], object], runs: int) -> dict[str, float]:
    command()
    samples = []
    for _ in range(runs):
        start = time.perf_counter()
        command()
        samples.append((time.perf_counter() - start) * 1000)
    return {
        "median": round(float(np.median(samples)), 2),
        "p90": round(float(np.percentile(samples, 90)), 2),
        "min": round(min(samples), 2),
        "n": runs,
    }
