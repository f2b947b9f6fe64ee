"""`pgfast export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from pgfast.bundle import Bundle
from pgfast.errors import MissingDependencyError


@click.command()
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--precision", default="fp32", show_default=True, help="fp32, fp16, bf16, int8 or int4, of the decoder.")
@click.option("--vision-precision", help="Of the vision encoder: fp32, fp16, bf16 or int8.")
@click.option("--target", type=click.Choice(["cpu", "cuda", "tensorrt", "tensorrt-rtx"]), default="cpu", show_default=True)
@click.option("--answer-template", help="Prompt of a question; {text} is the question, {language} a code such as en.")
@click.option(
    "--layout",
    type=click.Choice(["bundle", "transformers.js", "triton"]),
    default="bundle",
    show_default=True,
    help="transformers.js: the folder that the npm package @huggingface/transformers loads. "
    "triton: a model repository for NVIDIA Triton, from a checkpoint or a bundle.",
)
@click.option("--verify", is_flag=True, help="Compare with transformers and keep the report in the manifest (needs torch).")
@click.option(
    "--verify-data",
    type=click.Path(path_type=Path),
    help='Verify on these: JSON lines of {"image": path, "question": text}.',
)
@click.option(
    "--compute-capability",
    multiple=True,
    metavar="X.Y",
    help="Build TensorRT-RTX engines for it; may be repeated [default: 8.6, 8.9, 12.0].",
)
@click.option(
    "--block-size",
    type=click.Choice(["32", "64", "128"]),
    help="Weights that share a scale, with int8 and int4: larger is smaller and faster, and less exact [default: 32].",
)
@click.option("--max-images", type=int, help="Pictures in front of one prompt [default: up to 8 on cpu, elsewhere 1].")
@click.option("--languages", help="Codes that prompts may name, separated by commas [default: the model card's 35].")
@click.option(
    "--mask-decoder",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Add the decoder of segment's masks from a .npz such as big_vision's vae-oid.npz; CHECKPOINT may be a bundle then.",
)
@click.option("--adapter", type=click.Path(path_type=Path), metavar="FOLDER", help="Merge this LoRA adapter of PEFT.")
def export(
    checkpoint: str,
    out: Path,
    precision: str,
    vision_precision: str | None,
    target: str,
    answer_template: str | None,
    layout: str,
    verify: bool,
    verify_data: Path | None,
    compute_capability: tuple[str, ...],
    block_size: str | None,
    max_images: int | None,
    languages: str | None,
    mask_decoder: Path | None,
    adapter: Path | None,
) -> None:
    """Write the CHECKPOINT (a Hugging Face folder or Hub id) as a bundle into the new folder OUT."""
    try:
        from .build import export as write_bundle
        from .plan import LANGUAGES, ExportOptions
        from .triton import export_triton
    except ImportError as error:
        raise MissingDependencyError(error.name or "onnxscript", "export") from error
    options = ExportOptions(
        precision,
        target,
        vision_precision,
        answer_template,
        verify,
        verify_data,
        compute_capability,
        adapter,
        int(block_size) if block_size else None,
        max_images,
        tuple(code.strip() for code in languages.split(",")) if languages else LANGUAGES,
        mask_decoder,
    )
    if layout == "transformers.js":
        others = (verify, verify_data, answer_template, vision_precision, compute_capability, block_size, max_images, languages)
        if any(others) or mask_decoder or target != "cpu":
            raise click.UsageError("of all other options --layout transformers.js takes only --precision and --adapter")
        from .transformersjs import export_transformersjs

        with _progress() as on_progress:
            written = export_transformersjs(checkpoint, out, options, on_progress)
        print(f"pgfast: wrote {out}: for transformers.js, {precision}, {written / 1e6:,.1f} MB", file=sys.stderr)
        return
    with _progress() as on_progress:
        manifest = (export_triton if layout == "triton" else write_bundle)(checkpoint, out, options, on_progress)
    size = sum(entry.size for entry in manifest.files.values())
    print(
        f"pgfast: wrote {out}: {manifest.family}, {manifest.precision}, for {manifest.target}, {size / 1e6:,.1f} MB",
        file=sys.stderr,
    )
    if verify or verify_data:
        print(f"pgfast: parity {manifest.parity}", file=sys.stderr)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--compute-capability", multiple=True, metavar="X.Y", help="Build engines for it, too; may be repeated.")
def engines(bundle: Path, compute_capability: tuple[str, ...]) -> None:
    """Say which TensorRT-RTX engines the BUNDLE has, rebuild those that are out of date, and build those asked for."""
    from .tensorrt_engines import refresh_engines

    built = {engine.file for engine in refresh_engines(bundle, compute_capability)}
    present = Bundle.open(bundle).manifest.engines
    for engine in present:
        print(f"{engine.file:28}TensorRT-RTX {engine.builder}, {'built now' if engine.file in built else 'up to date'}")
    if not present:
        print("no engines: --compute-capability 8.9 builds those for one kind of GPU")


class _progress:
    """A progress bar on stderr, hidden when that is not a terminal."""

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("writing weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._bar.start()
        task = self._bar.add_task("weights", total=None)
        return lambda done, total: self._bar.update(task, completed=done, total=total)

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()
