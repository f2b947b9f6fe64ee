"""The report's pictures, as SVG text."""

from __future__ import annotations

import io
from typing import Any

from pgfast.errors import MissingDependencyError

from . import summary
from .summary import Data

OURS, PEER = ("#1f6f8b", "#7fb7c9"), ("#8a8a8a", "#c9c9c9")
"""Dark and light: first token and the rest."""


def draw(data: Data) -> dict[str, str]:
    """Return SVG by file name; a picture whose rows were not measured is left out.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(error.name or "matplotlib", "bench") from error
    result = {}
    for name, paint in (("latency", _latency), ("roofline", _roofline), ("batch", _batch)):
        figure: Any = Figure(figsize=(8, 4), layout="constrained")
        if paint(data, figure):
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            result[f"{name}.svg"] = text.getvalue()[text.getvalue().index("<svg") :]
    return result


def _latency(data: Data, figure: Any) -> bool:
    """Bars of the one-row workloads: median first token, and the rest; the line ends at p90."""
    workloads = [name for name in ("short", "long") if any(s["workload"] == name for s in data["samples"])]
    if not workloads:
        return False
    for axes, workload in zip(figure.subplots(1, len(workloads), squeeze=False)[0], workloads, strict=True):
        names = [e["name"] for e in data["contenders"] if summary.samples(data, e["name"], workload)]
        for place, name in enumerate(names):
            totals = summary.values(data, name, workload, "total")
            middle, p90, _ = summary.percentiles(totals)
            first = summary.median(summary.values(data, name, workload, "ttft")) or 0.0
            dark, light = OURS if name.startswith("pgfast") else PEER
            axes.barh(place, first, color=dark)
            axes.barh(place, max(0.0, middle - first), left=first, color=light)
            axes.plot([middle, p90], [place, place], color="black", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("seconds (dark: to the first token)")
        axes.set_title(workload)
    return True


def _roofline(data: Data, figure: Any) -> bool:
    """FLOP/s over FLOP per byte, under the machine's measured roofs."""
    limits = summary.ceilings(data)
    points = list(summary.rooflines(data, summary.longest(data)))
    if not points:
        return False
    axes = figure.subplots()
    xs = [0.1, *(roof.flops / roof.bytes for roof in points), 3000.0]
    for key, label in (("fp32_flops", "fp32 matmul"), ("fp16_flops", "fp16 matmul"), ("int8_flops", "int8 matmul")):
        if key in limits:
            corner = limits[key] / limits["bandwidth"]
            line = [min(xs), corner, max(xs)]
            axes.plot(line, [min(x * limits["bandwidth"], limits[key]) for x in line], label=f"{label} and memory traffic")
    for roof in points:
        marker = "o" if roof.phase == "first token" else "^"
        color = OURS[0] if roof.contender.startswith("pgfast") else PEER[0]
        axes.plot(roof.flops / roof.bytes, roof.flops / roof.seconds, marker, color=color)
        axes.annotate(roof.contender, (roof.flops / roof.bytes, roof.flops / roof.seconds), fontsize=6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte of memory traffic (circle: first token, triangle: per token)")
    axes.set_ylabel("FLOP/s")
    axes.legend(fontsize=7)
    return True


def _batch(data: Data, figure: Any) -> bool:
    """Tokens per second over the batch."""
    axes, drawn = figure.subplots(), False
    for entry in data["contenders"]:
        curve = [
            (int(workload.removeprefix("batch-")), value)
            for workload in data["settings"]["workloads"]
            if workload.startswith("batch-")
            and (value := summary.median(summary.values(data, entry["name"], workload, "tokens_per_second"))) is not None
        ]
        if curve:
            axes.plot(*zip(*curve, strict=True), marker="o", label=entry["name"])
            drawn = True
    axes.set_xlabel("batch")
    axes.set_ylabel("tokens per second, whole answers")
    axes.set_ylim(bottom=0)
    if drawn:
        axes.legend(fontsize=7)
    return drawn
