"""What one run of the benchmark measures, and for how long."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .workloads import WORKLOADS


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure and for how long."""

    bundles: tuple[Path, ...]
    checkpoint: Path | None = None
    """For the peers and for the roofline."""
    stock: Path | None = None
    """Stock ONNX export of the checkpoint, for the peers that run it."""
    peers: tuple[str, ...] = ()
    """Names as in `participants.PEERS`."""
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    rounds: int = 5
    """Counted rounds; one more comes before them."""
    starts: int = 3
    """Fresh processes per contender."""
    budget: float = 300.0
    """Seconds per workload and group; rounds that no longer fit are left out."""
    threads: int = os.cpu_count() or 1
    provider: str = "cpu"
    accuracy: Mapping[str, Any] = field(default_factory=dict)
    """Results of `pgfast bench accuracy` by bundle digest."""
    timeout: float = 900.0
    """Seconds after which a contender counts as hung."""
