"""`pgfast train`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from pgfast.errors import MissingDependencyError

from .config import TinyConfig


@click.group()
def train() -> None:
    """Train a PaliGemma."""


def _overrides(command: Any) -> Any:
    """Give every number of the recipe a flag of its own."""
    for field in reversed(dataclasses.fields(TinyConfig)):
        if isinstance(field.default, int | float | str):
            flag = "--" + field.name.replace("_", "-")
            command = click.option(flag, type=type(field.default), default=field.default, show_default=True)(command)
    return command


@train.command()
@click.argument("out", type=click.Path(path_type=Path))
@_overrides
def tiny(out: Path, **values: Any) -> None:
    """Train the demo model on easy-VQA in the folder OUT; the same command continues a run that was stopped.

    The Hugging Face checkpoint is OUT/checkpoint.
    """
    try:
        from .trainer import TinyRun
    except ImportError as error:
        raise MissingDependencyError(error.name or "torch", "train") from error
    config = TinyConfig(**values)
    with _Bars() as on_progress:
        run = TinyRun(config, out, on_progress)
        report = run.run()
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    print(f"pgfast: {out / 'checkpoint'}: validation accuracy {report['accuracy']:.2%}", file=sys.stderr)
    print(json.dumps(report))


class _Bars:
    """One progress bar per stage on stderr, or a line every hundred steps when that is not a terminal."""

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._terminal = console.is_terminal
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        text = "{task.description} {task.fields[message]}"
        self._bar = Progress(TextColumn(text), *columns, console=console, disable=not self._terminal)
        self._tasks: dict[str, Any] = {}
        self._bar.start()
        return self._update

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def _update(self, stage: str, done: int, total: int, message: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total, message="")
        self._bar.update(self._tasks[stage], completed=done, message=message)
        if not self._terminal and (done % 100 == 0 or done == total):
            print(f"{stage} {done}/{total} {message}", file=sys.stderr, flush=True)
