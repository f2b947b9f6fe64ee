"""`pgfast train`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from pgfast.errors import InputError, MissingDependencyError

from .cli_progress import ProgressBars
from .config import TrainConfig, flag
from .presets import PRESETS, resolve


def _values(command: Any) -> Any:
    """Give every value of `TrainConfig` a flag; one that is not given leaves the preset's value."""
    for field in reversed(dataclasses.fields(TrainConfig)):
        if field.name == "preset":
            continue
        name, kind, text = flag(field.name), type(field.default), field.metadata["help"]
        declaration = f"{name}/--no-{name[2:]}" if kind is bool else name
        one_of = field.metadata["one_of"]
        shown = "" if kind is bool or field.default == "" else f" [{field.default}]"
        # TrainConfig itself refuses values, in one line and also for users of the Python API
        metavar = "|".join(one_of) or None
        option_type = None if kind is bool else kind
        command = click.option(declaration, field.name, type=option_type, metavar=metavar, default=None, help=text + shown)(
            command
        )
    return command


@click.command(short_help="Fine-tune a PaliGemma.")
@click.option("--preset", required=True, type=click.Choice(list(PRESETS)), help="Recipe to start from.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the run; the same command continues it.")
@click.option("--dry-run", is_flag=True, help="Check everything, show the first batch, reckon memory and time; train nothing.")
@_values
def train(preset: str, out: Path | None, dry_run: bool, **values: Any) -> None:
    """Fine-tune a PaliGemma checkpoint on questions about pictures.

    Flags change the preset's values; defaults in brackets are those without a preset. OUT/checkpoint is the result, a Hugging
    Face folder or a PEFT adapter for `pgfast export`. Also under `torchrun -m pgfast train ...` or `accelerate launch`.
    """
    config = resolve(preset, {name: value for name, value in values.items() if value is not None})
    if out is None and not dry_run:
        raise InputError("no --out: name the folder of the run")
    try:
        from . import distributed
        from . import dry_run as rehearsal
        from .run import start
    except ImportError as error:
        raise MissingDependencyError(error.name or "torch", "train") from error
    processes = distributed.join()
    with ProgressBars(processes.is_main) as on_progress:
        if dry_run:
            text = rehearsal.rehearse(config, out, processes, on_progress)
        else:
            assert out is not None
            text = json.dumps(start(config, out, processes, on_progress))
    processes.close()  # not after an error: the others may be waiting inside an exchange, and the launcher ends them
    if processes.is_main:
        print(text)
