"""`results.json` of a training measurement -> a Markdown table per model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pgfast.errors import InputError

from .run import FORMAT
from .settings import FILLING, PUBLIC, VARIANTS

Data = dict[str, Any]


def write_report(results: Path, out: Path) -> Path:
    """Write `report.md` into an existing folder; returns its path.

    Raises:
        InputError: It is not a result file of `pgfast bench training`.
    """
    try:
        data = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{results} is not a result file of 'pgfast bench training': {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"{results} is not a result file of 'pgfast bench training' of this version")
    path = out / "report.md"
    path.write_text("\n".join(lines(data)) + "\n", encoding="utf-8")
    return path


def lines(data: Data) -> list[str]:
    """The report."""
    m, s = data["machine"], data["settings"]
    versions = ", ".join(
        f"{name} {m['versions'][name]}" for name in ("pgfast", "torch", "transformers") if name in m["versions"]
    )
    head = [
        "# pgfast bench training",
        "",
        f"- {m['processor']}, {m['cores']} cores ({', '.join(m['flags'])}), {m['memory_bytes'] / 2**30:.0f} GiB, {m['system']}",
        f"- {versions}, Python {m['python']}; {data['date']}, commit {m['commit']}",
        f"- {s['precision']} on both sides, {s['threads']} threads; {s['batch_size']} rows per pass, {s['accumulation']} "
        f"passes per step; counted steps: {s['counted']} after {s['warmup']} uncounted; {s['rounds']} rounds in turns, "
        "every run in a fresh process",
        "- transformers: its Trainer, PaliGemmaProcessor in the collator, `labels`; pgfast: preset `seed`. The same rows in "
        "the same batches, vision tower and projector frozen, data preparation inside the times",
        "- medians over rounds; a ratio is the median of the rounds' ratios; FLOP ratio: what the arithmetic alone would give",
    ]
    return head + [line for model in data["models"] for line in _model(data, model)]


def _model(data: Data, model: dict[str, Any]) -> list[str]:
    d, f, name = model["dimensions"], model["forward_flops"], model["name"]
    whole, patches = sum(f.values()), (d["image_size"] // d["patch_size"]) ** 2
    shares = ", ".join(f"{part} {value / whole:.1%}" for part, value in f.items())
    losses = ", ".join(f"{variant} {loss:.7g}" for variant, loss in first_losses(data, name).items())
    columns = ["", "samples/s", "times as fast", "FLOP ratio"]
    columns += ["peak memory", "of transformers'", "above the loaded model", "of transformers'"]
    return [
        "",
        f"## {name}: {model['parameters'] / 1e6:.0f}M parameters, random weights",
        "",
        f"- language model: hidden {d['hidden']}, feed-forward {d['intermediate']}, {d['layers']} layers, {d['heads']} heads "
        f"of {d['head_dim']}, vocabulary {d['vocabulary']:,}",
        f"- vision tower: hidden {d['vision_hidden']}, feed-forward {d['vision_intermediate']}, {d['vision_layers']} layers, "
        f"{d['image_size']} pixels, {patches} image tokens",
        f"- a sample has {model['positions']:.1f} positions, {model['answer_tokens']:.1f} of them with a loss; its forward "
        f"pass costs {whole / 1e9:.1f} GFLOP: {shares}",
        f"- loss of the first step: {losses}",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(_row(data, model, variant))} |" for variant in (*VARIANTS, FILLING)),
    ]


def _row(data: Data, model: dict[str, Any], variant: str) -> list[str]:
    name, flops = model["name"], model["step_flops"]
    speed = f"{np.median(values(data, name, variant, 'speed')):.3f}"
    row = [variant, speed, f"{ratio(data, name, variant, 'speed'):.2f}"]
    row.append(f"{flops[PUBLIC] / flops[variant]:.2f}" if variant in flops else "")
    for what in ("peak", "above"):
        found = values(data, name, variant, what)
        row += [f"{np.median(found) / 1e9:.2f} GB", f"{ratio(data, name, variant, what):.2f}"] if found else ["", ""]
    return row


def values(data: Data, model: str, variant: str, what: str) -> list[float]:
    """Return one figure per round: speed (samples/s), peak or above (bytes); none where the system does not tell."""
    found = [
        _value(data, sample, what) for sample in data["samples"] if (sample["model"], sample["variant"]) == (model, variant)
    ]
    return [value for value in found if value is not None]


def _value(data: Data, sample: dict[str, Any], what: str) -> float | None:
    if what == "speed":
        rows = data["settings"]["batch_size"] * data["settings"]["accumulation"]
        return float(rows * len(sample["seconds"]) / sum(sample["seconds"]))
    peak, loaded = sample["memory"]["peak"], sample["memory"]["loaded"]
    if peak is None or loaded is None:
        return None
    return float(peak if what == "peak" else peak - loaded)


def ratio(data: Data, model: str, variant: str, what: str) -> float:
    """Return the median over rounds of a figure over that of the public recipe; filling the cache is held against round 1."""
    pairs = zip(values(data, model, variant, what), values(data, model, PUBLIC, what), strict=False)
    return float(np.median([ours / theirs for ours, theirs in pairs]))


def first_losses(data: Data, model: str) -> dict[str, float]:
    """Return each variant's loss of the first step."""
    return {sample["variant"]: sample["losses"][0] for sample in data["samples"] if sample["model"] == model}
