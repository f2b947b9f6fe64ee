"""Two result files: which rows became slower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .summary import METRICS, Data, lengths, peak_memory, starts, values

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Row:
    """A figure in both files; `change` above 1 is worse."""

    name: str
    before: float
    after: float
    change: float
    low: float
    """Lower and upper bound of the change, 95 % bootstrap interval of the medians."""
    high: float

    def regressed(self, threshold: float) -> bool:
        """Worse by more than the threshold (0.05 is 5 %), and not by chance."""
        return self.change > 1 + threshold and self.low > 1


def compare(before: Data, after: Data) -> list[Row]:
    """Return every row that both files have, worst first.

    Figures are medians. Rows in which the answers have other lengths are left out: they did other work.
    """
    rows = []
    names = [entry["name"] for entry in before["contenders"] if entry["name"] in {e["name"] for e in after["contenders"]}]
    for name in names:
        for workload in before["settings"]["workloads"]:
            if lengths(before, name, workload) != lengths(after, name, workload):
                continue
            for key, metric in METRICS.items():
                pair = [values(data, name, workload, key) for data in (before, after)]
                if all(pair):
                    rows.append(_row(f"{name}, {workload}, {metric.title}", *pair, lower_is_better=metric.lower_is_better))
        for key, title in (("cold", "cold start"), ("load", "load"), ("first_answer", "load to first answer")):
            pair = [starts(data, name, key) for data in (before, after)]
            if all(pair):
                rows.append(_row(f"{name}, {title}", *pair, lower_is_better=True))
        memory = [peak_memory(data, name) for data in (before, after)]
        if memory[0] and memory[1]:
            rows.append(_row(f"{name}, peak memory", [float(memory[0])], [float(memory[1])], lower_is_better=True))
    return sorted(rows, key=lambda row: -row.change)


def _row(name: str, before: list[float], after: list[float], *, lower_is_better: bool) -> Row:
    rng = np.random.default_rng(0)
    a, b = np.array(before), np.array(after)
    again_a = np.median(a[rng.integers(len(a), size=(RESAMPLES, len(a)))], axis=1)
    again_b = np.median(b[rng.integers(len(b), size=(RESAMPLES, len(b)))], axis=1)
    medians = float(np.median(a)), float(np.median(b))
    change = medians[1] / medians[0] if lower_is_better else medians[0] / medians[1]
    low, high = np.percentile(again_b / again_a if lower_is_better else again_a / again_b, [2.5, 97.5])
    return Row(name, *medians, change, float(low), float(high))


def differences(before: Data, after: Data) -> list[str]:
    """Say what else differs: figures of two machines or settings do not compare."""
    pairs: dict[str, tuple[Any, Any]] = {
        name: (before["machine"][name], after["machine"][name]) for name in ("processor", "cores", "gpu", "memory_bytes")
    }
    pairs |= {name: (before["settings"][name], after["settings"][name]) for name in ("threads", "provider")}
    pairs["model"] = (before["model"]["config"], after["model"]["config"])
    return [
        f"{name} differs: {a} and {b}" if name != "model" else "the models differ" for name, (a, b) in pairs.items() if a != b
    ]


def missing_rows(before: Data, after: Data) -> list[str]:
    """Contenders and workloads that were measured before and are not any more."""
    measured = [{(s["contender"], s["workload"]) for s in data["samples"]} for data in (before, after)]
    return [f"{name}, {workload}" for name, workload in sorted(measured[0] - measured[1])]
