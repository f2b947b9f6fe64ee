"""`pgfast export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from pgfast.errors import MissingDependencyError


@click.command()
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True)
@click.option("--target", type=click.Choice(["cpu", "cuda", "tensorrt"]), default="cpu", show_default=True)
@click.option("--answer-template", help="Prompt of a question; {text} is the question, {language} a code such as en.")
@click.option("--verify", is_flag=True, help="Compare with transformers and keep the report in the manifest (needs torch).")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="FOLDER", help="Merge this LoRA adapter of PEFT.")
def export(
    checkpoint: str,
    out: Path,
    precision: str,
    target: str,
    answer_template: str | None,
    verify: bool,
    adapter: Path | None,
) -> None:
    """Write the CHECKPOINT (a Hugging Face folder or Hub id) as a bundle into the new folder OUT."""
    try:
        from .build import export as write
        from .plan import PROMPTS, ExportOptions
    except ImportError as error:
        raise MissingDependencyError(error.name or "onnxscript", "export") from error
    options = ExportOptions(precision, target, answer_template or PROMPTS["answer"], verify, adapter)
    with _progress() as on_progress:
        manifest = write(checkpoint, out, options, on_progress)
    size = sum(entry.size for entry in manifest.files.values())
    print(f"pgfast: wrote {out}: {manifest.family}, {precision}, for {target}, {size / 1e6:,.1f} MB", file=sys.stderr)
    if manifest.parity:
        print(f"pgfast: parity {manifest.parity}", file=sys.stderr)


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
