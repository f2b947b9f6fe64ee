"""What is measured, and for how long."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

PARTS = ("load", "overload", "malformed", "batch")
"""In the order in which they run; overload takes its capacity from its own short load."""
PGFAST = (sys.executable, "-m", "pgfast")


@dataclass(frozen=True, slots=True)
class Settings:
    """The defaults are what `docs/serving.md` promises figures for."""

    parts: tuple[str, ...] = PARTS
    model: str | None = None
    """Bundle folder; None: the demo model."""
    clients: int = 64
    """Connections that ask one question after another."""
    seconds: float = 60.0
    """Of load in all, and of overload."""
    rounds: int = 4
    """In which the load's seconds are split; before each, `answer_batch` runs as long."""
    warmup: float = 3.0
    """Seconds of load before anything is measured."""
    overload: float = 3.0
    """Offered rate over capacity."""
    requests: int = 10_000
    """Malformed ones."""
    rows: int = 10_000
    """Of the batch job."""
    kills: int = 20
    seed: int = 0
    serve: tuple[str, ...] = (*PGFAST, "serve")
    """Command that starts the server; `--port` and `--model` are put behind it."""
    serve_flags: tuple[str, ...] = ()
    overload_flags: tuple[str, ...] = ("--cache-pictures", "16")
    """For this part alone: a cache that is still filling would look like a leak, and 16 MB are full at once."""
    malformed_flags: tuple[str, ...] = ("--cache-pictures", "0")
    """For this part alone: damaged pictures that are kept on purpose would look like a leak, too."""
    batch: tuple[str, ...] = (*PGFAST, "batch")
    work: Path = Path("build/bench-serving")
    """For pictures, logs and results of the batch job."""
