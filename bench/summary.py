"""What the samples of a result file say: percentiles, ratios inside a group, and distance from the roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pgfast.export.config import PaliGemmaConfig, TextConfig, VisionConfig

from .cost import Cost

Data = dict[str, Any]
"""The content of `results.json`."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of one sample; None where it has no meaning."""

    title: str
    unit: str
    lower_is_better: bool
    of: Callable[[dict[str, Any]], float | None]


def _per_token(sample: dict[str, Any]) -> float | None:
    longest = max(map(len, sample["tokens"]))
    return None if longest < 2 or sample["each"] else (sample["total"] - sample["ttft"]) / (longest - 1)


METRICS = {
    "total": Metric("end to end", "s", True, lambda s: s["total"]),
    "ttft": Metric("first token", "s", True, lambda s: s["ttft"]),
    "per_token": Metric("per token", "s", True, _per_token),
    "next_question": Metric("next question", "s", True, lambda s: float(np.median(s["each"][1:])) if s["each"] else None),
    "answers_per_second": Metric("answers/s", "1/s", False, lambda s: len(s["tokens"]) / s["total"]),
    "tokens_per_second": Metric("tokens/s", "1/s", False, lambda s: sum(map(len, s["tokens"])) / s["total"]),
}


def samples(data: Data, contender: str, workload: str) -> list[dict[str, Any]]:
    """Counted samples; the first, uncounted round's where the budget left no other."""
    found = [s for s in data["samples"] if (s["contender"], s["workload"]) == (contender, workload)]
    return [s for s in found if not s["warmup"]] or found


def values(data: Data, contender: str, workload: str, metric: str) -> list[float]:
    """A metric of the counted samples, in the order measured."""
    numbers = (METRICS[metric].of(sample) for sample in samples(data, contender, workload))
    return [number for number in numbers if number is not None]


def median(numbers: list[float]) -> float | None:
    """Median; None of nothing."""
    return float(np.median(numbers)) if numbers else None


def percentiles(numbers: list[float]) -> tuple[float, float, float]:
    """p50, p90 and p99."""
    p50, p90, p99 = np.percentile(numbers, [50, 90, 99])
    return float(p50), float(p90), float(p99)


def ratio(data: Data, ours: str, peer: str, workload: str, metric: str) -> float | None:
    """How many times better `ours` is: the median over rounds in which both ran in one group and made as many tokens.

    The first, uncounted round counts where the two have no other in common.
    """
    rounds: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for sample in data["samples"]:
        if sample["workload"] == workload and sample["contender"] in (ours, peer):
            rounds.setdefault((sample["group"], sample["round"]), {})[sample["contender"]] = sample
    pairs = [pair for pair in rounds.values() if len(pair) == 2 and _lengths(pair[ours]) == _lengths(pair[peer])]
    m = METRICS[metric]
    ratios = []
    for pair in [pair for pair in pairs if not pair[ours]["warmup"]] or pairs:
        a, b = m.of(pair[ours]), m.of(pair[peer])
        if a and b:
            ratios.append(b / a if m.lower_is_better else a / b)
    return median(ratios)


def _lengths(sample: dict[str, Any]) -> list[int]:
    return [len(row) for row in sample["tokens"]]


def lengths(data: Data, contender: str, workload: str) -> set[int]:
    """How many tokens the answers have."""
    return {length for sample in samples(data, contender, workload) for length in _lengths(sample)}


def longest(data: Data) -> str:
    """The one-row workload that says most about single tokens."""
    return "long" if any(sample["workload"] == "long" for sample in data["samples"]) else "short"


def starts(data: Data, contender: str, key: str) -> list[float]:
    """`cold`, `load` or `first_answer` of every start, in seconds."""
    return [start[key] for start in data["starts"] if start["contender"] == contender]


def peak_memory(data: Data, contender: str, where: str = "peak") -> int | None:
    """Largest peak of the processes that were started alone, after one answer; `where` is peak (host) or device."""
    found = [s["memory"].get(where) for s in data["starts"] if s["contender"] == contender]
    return max((value for value in found if value), default=None)


def contender(data: Data, name: str) -> dict[str, Any] | None:
    """What the file says about a contender; None if it took no part."""
    return next((entry for entry in data["contenders"] if entry["name"] == name), None)


def cost_of(data: Data) -> Cost | None:
    """The model's arithmetic; None if the run had no checkpoint."""
    raw = data["model"]["config"]
    if raw is None:
        return None
    parts = {"vision": VisionConfig(**raw["vision"]), "text": TextConfig(**raw["text"])}
    return Cost(PaliGemmaConfig(**(raw | parts)))


def ceilings(data: Data) -> dict[str, float]:
    """The best that was measured before and after the samples; `bandwidth` is the better of reading and copying."""
    names = {name for measured in data["ceilings"] for name in measured}
    best = {name: max(measured.get(name, 0.0) for measured in data["ceilings"]) for name in names}
    return best | ({"bandwidth": max(best["read_bytes"], best["copy_bytes"])} if best else {})


@dataclass(frozen=True, slots=True)
class Roof:
    """A phase of one contender against the machine: the floor is what its ceilings allow at the best."""

    contender: str
    phase: str
    """first token or per token."""
    seconds: float
    flops: float
    bytes: float
    floor: float

    @property
    def share(self) -> float:
        """Floor over measured: 1 is the machine's limit (above: the phase runs in a type faster than the ceiling's)."""
        return self.floor / self.seconds


def rooflines(data: Data, workload: str) -> Iterator[Roof]:
    """Both phases of every contender in a one-row workload."""
    for entry in data["contenders"]:
        name = entry["name"]
        for phase, metric in (("first token", "ttft"), ("per token", "per_token")):
            measured, work = median(values(data, name, workload, metric)), work_of(data, entry, workload, phase)
            if measured is not None and work is not None:
                yield Roof(name, phase, measured, *work)


def work_of(data: Data, entry: dict[str, Any], workload: str, phase: str) -> tuple[float, float, float] | None:
    """FLOP, bytes of memory traffic, and floor in seconds of a phase of a one-row workload; None if not known."""
    cost, limits = cost_of(data), ceilings(data)
    if cost is None or workload not in data["model"]["positions"] or not {"bandwidth", "fp32_flops"} <= limits.keys():
        return None
    positions = data["model"]["positions"][workload]
    vision_bytes, decoder_bytes, value_bytes = _bytes(entry, cost)
    bundle = entry.get("bundle")
    vision_limit = _ceiling(limits, bundle["vision_precision"] if bundle else entry["precision"])
    limit = _ceiling(limits, entry["precision"])
    cache = cost.cache_bytes(positions, bytes_per_value=value_bytes)
    if phase == "first token":
        vision, prefill = cost.vision_flops(), cost.prefill_flops(positions)
        traffic = vision_bytes + decoder_bytes + cache
        compute = vision / vision_limit + prefill / limit
        return vision + prefill, traffic, max(compute, traffic / limits["bandwidth"])
    flops, traffic = cost.step_flops(positions), decoder_bytes + cache
    return flops, traffic, max(flops / limit, traffic / limits["bandwidth"])


def _bytes(entry: dict[str, Any], cost: Cost) -> tuple[float, float, float]:
    """Bytes of vision weights and of the weights a step reads, and of one cached number."""
    width = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}
    precision = entry["precision"].split("-")[0]
    if "bundle" not in entry:
        return cost.vision_params * width[precision], cost.weight_bytes(width[precision]), width[precision]
    sizes = entry["bundle"]["graph_bytes"]
    stored = cost.decoder_params + (0 if cost.config.text.tied else cost.head_params)
    return sizes["vision_encoder"], cost.weight_bytes(sizes["decoder"] / stored), width.get(precision, 4.0)


def _ceiling(limits: dict[str, float], precision: str) -> float:
    """The matmul that a precision is held against.

    On a CPU int4 weights meet int8 activations, and 16-bit types are held against fp32, which every processor has; on a
    GPU all but fp32 compute in fp16.
    """
    if precision == "fp32":
        return limits["fp32_flops"]
    small = limits.get("int8_flops", limits["fp32_flops"]) if precision in ("int8", "int4") else limits["fp32_flops"]
    return limits.get("fp16_flops", small)
