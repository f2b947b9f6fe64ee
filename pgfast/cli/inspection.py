"""`pgfast inspect`: what a bundle is, and whether its files are as they were written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from pgfast.bundle import Bundle
from pgfast.cli import printable
from pgfast.manifest import Manifest


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path), envvar="PGFAST_MODEL")
@click.option("--check", is_flag=True, help="Hash files larger than 64 MiB too.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows to reckon the memory for.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest itself, with the memory.")
def inspect(bundle: Path | None, check: bool, batch: int, as_json: bool) -> None:
    """Print the manifest of BUNDLE (by default the embedded one) and check its files."""
    from pgfast.loading import demo_bundle

    opened = Bundle.open(bundle or demo_bundle(), full_check=check)
    manifest = opened.manifest
    if as_json:
        raw = json.loads(manifest.to_json()) | {"memory": {"batch": batch, **memory(manifest, batch)}}
        print(json.dumps(raw, indent=2, ensure_ascii=False))
    else:
        print(_summary(manifest, check, batch))


def memory(m: Manifest, batch: int) -> dict[str, int]:
    """Reckon bytes: weights, and what each row of a batch adds (cache, image features, logits).

    Activations and the copies that kernels make of weights come on top.
    """
    d, item = m.dimensions, 4 if m.cache_type == "float32" else 2
    cache = 2 * d.num_hidden_layers * d.num_key_value_heads * m.cache_length * d.head_dim * item
    row = cache + d.num_image_tokens * d.hidden_size * item + 4 * d.vocab_size
    weights = sum(entry.size for name, entry in m.files.items() if name.endswith(".data"))
    return {"weights": weights, "per_row": row, "total": weights + batch * row}


def _summary(m: Manifest, checked: bool, batch: int) -> str:
    d = m.dimensions
    parity = m.parity or {}
    rows = {
        "family": f"{m.family}, {m.precision} (vision {m.vision_precision}), for {m.target} ({m.dialect} operators)",
        "source": f"{m.source.checkpoint}{f' at {m.source.revision}' if m.source.revision else ''}, by {m.exporter}",
        "picture": f"{m.image.size} x {m.image.size}, {m.image.resampling}, {d.num_image_tokens} tokens",
        "decoder": f"{d.num_hidden_layers} layers of {d.hidden_size}, {d.num_attention_heads} heads over "
        f"{d.num_key_value_heads} of {d.head_dim}, vocabulary {d.vocab_size}",
        "limits": f"{m.limits.prompt_tokens} prompt tokens, {m.limits.new_tokens} new tokens, {m.limits.images} pictures",
        "memory": "weights {weights:,} bytes, each row {per_row:,}; at batch {batch} {total:,}".format(
            batch=batch, **memory(m, batch)
        ),
        "calibration": "temperature {temperature:.4g}; calibration error {ece_before:.2%} before, {ece_after:.2%} with it, on "
        "{questions:,} questions".format(**dataclasses.asdict(m.calibration))
        if m.calibration
        else "none (pgfast eval --calibrate)",
        "prompts": "; ".join(f"{name}: {template!r}" for name, template in m.prompts.items()),
        "parity": ", ".join(f"{key} {value}" for key, value in parity.items()) or "not verified (export with --verify)",
    }
    lines = [f"{name:12}{text}" for name, text in rows.items()]
    stale = m.engines_of_other_graphs()
    for e in m.engines:
        state = ", STALE: built from another graph ('pgfast engines' rebuilds)" if e in stale else ""
        lines.append(
            f"engine {e.graph} for compute capability {e.compute_capability}, batch 1 to {e.max_batch}, "
            f"by TensorRT-RTX {e.builder}{state}"
        )
    for name, entry in m.files.items():
        lines.append(f"{name:28}{entry.size:>14,} bytes  sha256 {entry.sha256[:16]}")
    lines.append("all hashes match" if checked else "all sizes match, hashes of files up to 64 MiB match")
    return "\n".join(map(printable, lines))
