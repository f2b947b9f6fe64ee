"""`docs/performance.md`: target, measured, limit, made from result files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import summary
from .summary import Data
from .targets import TARGETS, Target

Measured = tuple[float, float | None]
"""What was measured, and what the machine's ceilings allow at the best; None where they say nothing about it."""


def _ratio(data: Data, t: Target) -> Measured | None:
    value = summary.ratio(data, t.contender, t.against, t.workload, t.metric)
    if value is None:
        return None
    # the same peer against a pgfast that is at the roofline
    share = _share(data, t)
    return value, value / share if share else None


def _share(data: Data, t: Target) -> float | None:
    """Roofline floor over measured."""
    roofs = {roof.phase: roof for roof in summary.rooflines(data, t.workload) if roof.contender == t.contender}
    if set(roofs) != {"first token", "per token"}:
        return None
    if t.metric == "ttft":
        return roofs["first token"].share
    if t.metric == "per_token":
        return roofs["per token"].share
    steps = max(summary.lengths(data, t.contender, t.workload)) - 1
    floor, measured = (
        getattr(roofs["first token"], name) + steps * getattr(roofs["per token"], name) for name in ("floor", "seconds")
    )
    return float(floor / measured)


def _memory_ratio(data: Data, t: Target) -> Measured | None:
    ours, theirs = (summary.peak_memory(data, name) for name in (t.contender, t.against))
    entry = summary.contender(data, t.contender)
    # weights have to be somewhere
    return (ours / theirs, entry["file_bytes"] / theirs) if ours and theirs and entry else None


def _vision_saved(data: Data, t: Target) -> Measured | None:
    """By the encoder's own time: the difference between two answers is smaller than the noise of their prompts."""
    saved = [
        1 - sample["later_vision"] / (len(sample["each"]) - 1) / sample["vision"]
        for sample in summary.samples(data, t.contender, t.workload)
        if sample["vision"] and len(sample["each"]) > 1 and "later_vision" in sample
    ]
    value = summary.median(saved)
    return None if value is None else (value, 1.0)


def _first_answer(data: Data, t: Target) -> Measured | None:
    value = summary.median(summary.starts(data, t.contender, "first_answer"))
    return None if value is None else (value, None)


def _batch_gain(data: Data, t: Target) -> Measured | None:
    one, many = (
        summary.median(summary.values(data, t.contender, workload, "tokens_per_second")) for workload in ("batch-1", t.workload)
    )
    return (many / one, None) if one and many else None


def _median(data: Data, t: Target) -> Measured | None:
    value = summary.median(summary.values(data, t.contender, t.workload, t.metric))
    share = _share(data, t)
    return None if value is None else (value, value * share if share else None)


def _rate(data: Data, t: Target) -> Measured | None:
    value = summary.median(summary.values(data, t.contender, t.workload, t.metric))
    return None if value is None else (value, None)


def _roofline(data: Data, t: Target) -> Measured | None:
    share = _share(data, t)
    return None if share is None else (share, 1.0)


MEASURES: dict[str, Callable[[Data, Target], Measured | None]] = {
    "ratio": _ratio,
    "memory ratio": _memory_ratio,
    "vision saved": _vision_saved,
    "first answer": _first_answer,
    "batch gain": _batch_gain,
    "median": _median,
    "rate": _rate,
    "roofline": _roofline,
}


def performance(results: Sequence[tuple[str, Data]]) -> str:
    """Return the Markdown table.

    Args:
        results: Name and content of result files; a target is taken from the first in which it was measured.
    """
    lines = [
        "# Performance: target, measured, limit",
        "",
        "Made by `pgfast bench performance` from the result files named below; do not edit. Ratios are medians over",
        "interleaved rounds. The limit is what the machine's own ceilings (memory reads, matmuls, measured in the same run)",
        "allow at the best.",
        "",
        "| | target | measured | limit | |",
        "|---|---|---|---|---|",
    ]
    for target in TARGETS:
        found = next(filter(None, (_measure(data, target) for _, data in results)), None)
        wanted = f"{target.bound} {_number(target.value, target.unit)}"
        if found is None:
            lines.append(f"| {target.what} | {wanted} | not measured | | |")
            continue
        measured, limit = found
        met = measured >= target.value if target.bound == ">=" else measured <= target.value
        best = "" if limit is None else _number(limit, target.unit)
        lines.append(
            f"| {target.what} | {wanted} | {_number(measured, target.unit)} | {best} | {'met' if met else '**missed**'} |"
        )
    lines += ["", "## Sources", ""]
    for name, data in results:
        m = data["machine"]
        where = m["gpu"] or f"{m['processor']}, {m['cores']} cores"
        lines.append(f"- `{name}`: {where}, {data['settings']['threads']} threads, {data['date']}, commit {m['commit']}")
        lines += [f"  - accuracy of {line}" for line in accuracy_lines(data)]
    return "\n".join(lines) + "\n"


def _measure(data: Data, target: Target) -> Measured | None:
    on_gpu = data["settings"]["provider"] != "cpu"
    return MEASURES[target.of](data, target) if on_gpu == (target.device == "cuda") else None


def _number(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.2f} ms"
    return f"{value:.2f}{unit}"


def accuracy_lines(data: Data) -> list[str]:
    """One line per bundle: speed never stands without it."""
    lines = []
    for entry in data["contenders"]:
        if (bundle := entry.get("bundle")) is None:
            continue
        parity, accuracy = bundle["parity"], bundle["accuracy"]
        said = []
        if parity:
            said.append(
                f"logits within {parity.get('max_relative_logit_error')} of {parity.get('reference')}, "
                f"greedy tokens agree at {parity.get('greedy_agreement')} of {parity.get('positions')} positions"
            )
        if accuracy:
            said.append(f"{accuracy['accuracy']:.3%} of {accuracy['count']} easy-VQA questions right")
        lines.append(f"{entry['name']} ({bundle['digest'][:12]}): {'; '.join(said) or 'not measured (export with --verify)'}")
    return lines
