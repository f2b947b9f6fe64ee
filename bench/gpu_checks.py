"""Is the answer right on a GPU? The CUDA runtime against the CPU in fp32, captured against not, alone against in a batch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pgfast.bundle import Bundle
from pgfast.runtime.cuda_decoder import RING
from pgfast.runtime.model import Model
from pgfast.runtime.providers import Target, check_available

STEPS = 64
TOLERANCES = {"fp16": 1e-2, "bf16": 8e-2}
"""Largest relative error of logits against fp32."""
PROMPT_LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw."""

    check: str
    ok: bool
    seen: str


def open_model(folder: Path, provider: str, *, graphs: bool = True) -> Model:
    """Open a bundle below the engine; `graphs` False: on CUDA without CUDA graphs."""
    check_available(provider)
    model = Model(Bundle.open(folder), Target(provider))
    if not graphs:
        model.decoder.runner.disable()  # type: ignore[attr-defined]
    return model


def pixels_of(model: Model, seed: int) -> NDArray[np.float32]:
    """Return a random picture, float32 [1, 3, R, R]."""
    size = model.bundle.manifest.image.size
    return np.random.default_rng(seed).uniform(-1, 1, (1, 3, size, size)).astype(np.float32)


def prompt_of(length: int) -> list[int]:
    """Return ids of a prompt of `<bos>` and `length` more."""
    return [2, *np.random.default_rng(length).integers(5, 1000, length).tolist()]


def greedy(model: Model, seed: int, length: int, burst: int = 1) -> list[int]:
    """Return the first `STEPS` greedy tokens of a random picture and prompt."""
    decoder = model.decoder
    tokens: list[int] = decoder.prompt(model.encode(pixels_of(model, seed)), [prompt_of(length)]).tokens[0].tolist()
    while len(tokens) < STEPS:
        tokens += decoder.step(1, burst=min(burst, STEPS - len(tokens))).tokens[:, 0].tolist()
    decoder.release(0)
    return tokens


def relative_error(ours: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """|ours - wanted| / |wanted|."""
    return float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))


def follow(model: Model, wanted: Callable[[Sequence[int]], NDArray[np.float32]], seed: int, tolerance: float) -> Finding:
    """Feed the reference's greedy tokens and compare logits and choice at each of `STEPS` positions.

    Args:
        model: On the GPU.
        wanted: Logits float32 [V] of the reference after these generated tokens.
        seed: Of picture; the prompt is `prompt_of(9)`.
        tolerance: Largest relative error of logits. Another choice is right only where fp16 cannot tell the two apart.
    """
    decoder = model.decoder
    decoder.prompt(model.encode(pixels_of(model, seed)), [prompt_of(9)])
    generated: list[int] = []
    worst, others, ties = 0.0, 0, 0
    for _ in range(STEPS):
        ours, theirs = decoder.logits(0), wanted(generated)
        error = relative_error(ours, theirs)
        token, best = int(ours.argmax()), int(theirs.argmax())
        close = theirs[best] - theirs[token] <= 2 * error * np.abs(theirs).max()
        others, ties = others + (token != best and not close), ties + (token != best and bool(close))
        worst = max(worst, error)
        generated.append(best)
        decoder.step(1, np.array([best]))
    decoder.release(0)
    seen = f"logit error {worst:.1e}, {others} of {STEPS} tokens differ, {ties} near ties, {len(set(generated))} kinds of token"
    return Finding("tokens and logits against the reference", worst < tolerance and others == 0, seen)


def cpu_logits(cpu: Model, seed: int) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    """Return a reference for `follow`: it must be asked with one more token each time."""
    cpu.decoder.prompt(cpu.encode(pixels_of(cpu, seed)), [prompt_of(9)])

    def wanted(generated: Sequence[int]) -> NDArray[np.float32]:
        if generated:
            cpu.decoder.step(1, np.array(generated[-1:]))
        return cpu.decoder.logits(0).copy()

    return wanted


def check(gpu: Model, plain: Model, cpu: Model, tolerance: float) -> list[Finding]:
    """Run all checks of a small model.

    Args:
        gpu: On CUDA.
        plain: The same without CUDA graphs.
        cpu: The same checkpoint on the CPU in fp32.
        tolerance: Largest relative error of logits.
    """
    found = [follow(gpu, cpu_logits(cpu, 0), 0, tolerance)]
    cpu.decoder.release(0)
    first, single = greedy(gpu, 1, 9, burst=RING), greedy(plain, 1, 9)
    found.append(
        Finding("bursts of CUDA graphs equal single runs without", first == single, f"{len(set(first))} kinds of token")
    )
    greedy(gpu, 2, 30, burst=5)
    again = greedy(gpu, 1, 9, burst=3)
    found.append(
        Finding("the same question after another one", again == first, f"{sum(map(int.__eq__, again, first))} of {STEPS}")
    )
    errors = []
    for length in PROMPT_LENGTHS:
        for model in (gpu, cpu):
            model.decoder.prompt(model.encode(pixels_of(model, length)), [prompt_of(length)])
        errors.append(relative_error(gpu.decoder.logits(0), cpu.decoder.logits(0)))
    found.append(Finding("prompts of odd lengths", max(errors) < tolerance, f"largest relative error {max(errors):.1e}"))
    for rows in (2, 3, 8):
        error = _batch_error(gpu, rows)
        found.append(Finding(f"{rows} rows against each alone", error < tolerance, f"relative error {error:.1e}"))
    return found


def _batch_error(model: Model, rows: int) -> float:
    """Largest relative error of rows of different length, joined one by one, against each alone; tokens are given."""
    decoder = model.decoder
    features = [model.encode(pixels_of(model, row)) for row in range(rows)]
    tokens = np.random.default_rng(rows).integers(5, 1000, (8, rows))
    alone = []
    for row in range(rows):
        decoder.prompt(features[row], [prompt_of(3 + 2 * row)])
        for given in tokens[:, row]:
            decoder.step(1, np.array([given]))
        alone.append(decoder.logits(0).copy())
        decoder.release(0)
    for row in range(rows):
        decoder.prompt(features[row], [prompt_of(3 + 2 * row)], first=row)
    for given in tokens:
        decoder.step(rows, given)
    errors = [relative_error(decoder.logits(row), alone[row]) for row in range(rows)]
    for row in range(rows):
        decoder.release(row)
    return max(errors)


def attention_kernels(folder: Path) -> Finding:
    """Ask ONNX Runtime which attention kernels it takes for a prompt and a token, in a process of its own."""
    code = (
        "import torch, sys, pgfast; pgfast.__path__ += [sys.argv[1]]\n"
        "from pathlib import Path; from pgfast.bench import gpu_checks as g\n"
        "m = g.open_model(Path(sys.argv[2]), 'cuda', graphs=False); g.greedy(m, 0, 9)"
    )
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", code, root, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}
    )
    return Finding("attention kernels", *_kernels(done.stdout + done.stderr))


def _kernels(text: str) -> tuple[bool, str]:
    """Count the lines that name a kernel: XQA must decode."""
    names = re.findall(r"SdpaKernel=(\w+)", text)
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return "XQA" in counts, str(counts) if counts else f"no line says so: {text[-300:]}"


def small_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Save a random PaliGemma with the head shape of the real one, 8 heads of 256 over one key/value head."""
    import torch
    from pgfast.train.demo import tiny_paligemma
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    tokenizer = tiny_paligemma.build_tokenizer(["what color is it ? yes no"])
    raw = tiny_paligemma.build_config(tokenizer).to_dict()
    text = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 256}
    # two tables: with one, random weights repeat a token for ever, which proves little
    raw["text_config"] |= text | {"num_key_value_heads": 1, "tie_word_embeddings": False, "max_position_embeddings": 512}
    raw["vision_config"] |= {"hidden_size": 144, "num_attention_heads": 2, "num_hidden_layers": 2, "projection_dim": 512}
    raw |= {"hidden_size": 512, "projection_dim": 512, "tie_word_embeddings": False}
    model = PaliGemmaForConditionalGeneration._from_config(PaliGemmaConfig(**raw), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            neutral = 1.0 if name.endswith(("layer_norm1.weight", "layer_norm2.weight", "post_layernorm.weight")) else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + neutral)
    tiny_paligemma.save_checkpoint(folder, model, tokenizer)
    return folder
