"""One session on a GPU machine: bundles are made there, checked, then timed; a table is printed last, JSON is written.

Nothing need be installed but the libraries. In the repository's root, with onnxruntime-gpu unpacked in SITE:

    PYTHONPATH=.:SITE python -c "import torch, pgfast; pgfast.__path__ += ['.']
    from pgfast.bench.gpu_session import main; main()" WORK OUT.json

WORK keeps checkpoints and bundles, so that a second call goes on where the first was stopped. torch is imported first because
it loads CUDA's libraries, which onnxruntime finds nowhere when it lies in a folder of its own.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pgfast
from pgfast.runtime.providers import import_onnxruntime
from pgfast.types import GenerateOptions

from .gpu_checks import (
    TOLERANCES,
    Finding,
    attention_kernels,
    check,
    follow,
    open_model,
    pixels_of,
    prompt_of,
    small_checkpoint,
)

logger = logging.getLogger(__name__)

FULL = "3b-224"
TARGETS = {"ms per token, bursts of 8": 1.5, "ms to first token": 4.0, "answers/s, 32 at a time, 3 tokens": 250.0}
"""The limits of issue 4 for an H200: at most so many milliseconds, at least so many answers."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything; a part that fails is reported and the next one goes on."""
    work, out = map(Path, arguments or sys.argv[1:])
    logging.basicConfig(level=logging.INFO)
    report: dict[str, Any] = {"machine": machine(), "findings": [], "figures": {}, "failures": []}
    for part in (small_part, full_checks, full_times, engine_times, transformers_times):
        try:
            part(work, report)
        except Exception as error:
            logger.exception("%s", part.__name__)
            report["failures"].append(f"{part.__name__}: {error}")
        out.write_text(json.dumps(report, indent=2))
    sys.stdout.write(table(report))


def machine() -> dict[str, Any]:
    """Name what the figures depend on."""
    onnxruntime = import_onnxruntime()
    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {module.__name__: module.__version__ for module in (pgfast, onnxruntime, torch, transformers)}
    return {"gpu": gpu, "cuda": torch.version.cuda, **versions}


def bundle(work: Path, checkpoint: Path, precision: str, target: str) -> Path:
    """Export unless it is there already."""
    from pgfast.export.build import export
    from pgfast.export.plan import ExportOptions

    out = work / f"{checkpoint.name}-{target}-{precision}"
    if not out.exists():
        export(str(checkpoint), out, ExportOptions(precision, target))
    return out


def full_checkpoint(work: Path) -> Path:
    """Make the full-size random checkpoint unless it is there already."""
    from .synth import synthesize

    out = work / FULL
    if not (out / "tokenizer.json").exists():  # the last file that is written
        synthesize(FULL, out)
    return out


def small_part(work: Path, report: dict[str, Any]) -> None:
    """Correctness of a small model against the CPU."""
    checkpoint = work / "small"
    if not checkpoint.exists():
        work.mkdir(parents=True, exist_ok=True)
        small_checkpoint(checkpoint)
    cpu = open_model(bundle(work, checkpoint, "fp32", "cpu"), "cpu")
    for precision, tolerance in TOLERANCES.items():
        folder = bundle(work, checkpoint, precision, "cuda")
        models = open_model(folder, "cuda"), open_model(folder, "cuda", graphs=False)
        note(report, precision, [*check(*models, cpu, tolerance), attention_kernels(folder)])


def full_checks(work: Path, report: dict[str, Any]) -> None:
    """Full size, fp16, against transformers in fp32 on the same GPU."""
    from pgfast.export.verify import TransformersReference

    checkpoint = full_checkpoint(work)
    model = open_model(bundle(work, checkpoint, "fp16", "cuda"), "cuda")
    reference = TransformersReference(checkpoint, device="cuda")
    pixels = pixels_of(model, 0)
    finding = follow(model, lambda generated: reference.logits(pixels, prompt_of(9), generated), 0, TOLERANCES["fp16"])
    note(report, f"{FULL} fp16", [finding])
    report["figures"]["largest activation (fp16 holds 65504)"] = reference.largest_activation


def full_times(work: Path, report: dict[str, Any]) -> None:
    """Tokens, first token, batches."""
    folder = bundle(work, full_checkpoint(work), "fp16", "cuda")
    model, figures = open_model(folder, "cuda"), report["figures"]
    decoder, pixels, prompt = model.decoder, pixels_of(model, 0), prompt_of(9)
    decoder.prompt(model.encode(pixels), [prompt])
    length = decoder.length(0)

    def steps(rows: int, burst: int) -> Callable[[], object]:
        def run() -> None:
            for row in range(rows):
                decoder.rewind(row, length)
            for _ in range(64 // burst):
                decoder.step(rows, burst=burst)

        return run

    for burst in (8, 4, 2, 1):
        name = f"ms per token, bursts of {burst}" if burst > 1 else "ms per token, one at a time"
        figures[name] = median_ms(steps(1, burst)) / 64
    figures["ms vision"] = median_ms(lambda: model.encode(pixels))
    features = model.encode(pixels)
    figures["ms prompt of 266"] = median_ms(lambda: decoder.prompt(features, [prompt]))
    figures["ms to first token"] = median_ms(lambda: decoder.prompt(model.encode(pixels), [prompt]))
    for row in range(1, decoder.slots):
        decoder.prompt(features, [prompt], first=row)
    figures[f"ms per step of {decoder.slots} rows"] = median_ms(steps(decoder.slots, 8)) / 64
    data = sum(path.stat().st_size for path in folder.glob("decoder.onnx.data"))
    figures["GB/s read per token"] = data / figures["ms per token, bursts of 8"] / 1e6
    figures["GB/s of a copy, read and written"] = copy_rate()


def engine_times(work: Path, report: dict[str, Any]) -> None:
    """Whole answers through the engine: pictures, scheduler and all."""
    folder, figures = bundle(work, full_checkpoint(work), "fp16", "cuda"), report["figures"]
    with pgfast.load(folder, provider="cuda") as engine:
        size = engine.manifest.image.size
        pictures = np.random.default_rng(0).integers(0, 255, (32, size, size, 3), dtype=np.uint8)
        questions: list[Any] = [(picture, "what is in the picture?") for picture in pictures]
        options = GenerateOptions(max_new_tokens=3)
        figures["ms Engine.answer, 3 tokens"] = median_ms(lambda: engine.answer(*questions[0], options=options))
        seconds = median_ms(lambda: engine.answer_batch(questions, options=options), runs=5) / 1000
        figures["answers/s, 32 at a time, 3 tokens"] = len(questions) / seconds


def transformers_times(work: Path, report: dict[str, Any]) -> None:
    """The same model in transformers, fp16: eager, and compiled with a static cache."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    loaded: Any = PaliGemmaForConditionalGeneration.from_pretrained(full_checkpoint(work), dtype=torch.float16)
    model, config = loaded.eval().cuda(), loaded.config
    ids = [config.image_token_id] * config.text_config.num_image_tokens + prompt_of(9)
    inputs = {
        "input_ids": torch.tensor([ids], device="cuda"),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long, device="cuda"),
        "token_type_ids": torch.zeros(1, len(ids), dtype=torch.long, device="cuda"),
        "pixel_values": torch.randn(1, 3, 224, 224, dtype=torch.float16, device="cuda"),
    }
    for name, more in (("eager", {}), ("compiled, static cache", {"cache_implementation": "static"})):

        def generate(count: int, more: dict[str, Any] = more) -> Callable[[], object]:
            def run() -> None:
                model.generate(**inputs, do_sample=False, min_new_tokens=count, max_new_tokens=count, **more)
                torch.cuda.synchronize()

            return run

        first, many = median_ms(generate(1), runs=5), median_ms(generate(65), runs=5)
        report["figures"][f"transformers {name}: ms to first token"] = first
        report["figures"][f"transformers {name}: ms per token"] = (many - first) / 64


def median_ms(run: Callable[[], object], runs: int = 10) -> float:
    """Median wall time of a call after two that are not counted."""
    samples = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        run()
        samples.append((time.perf_counter() - start) * 1000)
    return statistics.median(samples[2:])


def copy_rate() -> float:
    """Bytes per second, in GB, that a copy of 2 GiB reads and writes."""
    import torch

    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return 2 * 2**31 / median_ms(run) / 1e6


def note(report: dict[str, Any], what: str, findings: Sequence[Finding]) -> None:
    """Put findings in the report."""
    report["findings"] += [{"of": what, "check": f.check, "ok": f.ok, "seen": f.seen} for f in findings]


def table(report: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [" ".join(f"{key} {value}" for key, value in report["machine"].items())]
    lines += [f"{'ok ' if f['ok'] else 'BAD'} {f['of']:12} {f['check']:48} {f['seen']}" for f in report["findings"]]
    for name, value in report["figures"].items():
        limit = TARGETS.get(name)
        lines.append(f"{name:44} {value:10.3f}" + (f"   target {limit}" if limit is not None else ""))
    lines += [f"FAILED {failure}" for failure in report["failures"]]
    return "\n".join(lines) + "\n"
