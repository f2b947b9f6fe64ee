"""The parts in order, each on a server of its own; one JSON file, written anew after every part."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pgfast.errors import InputError, PgfastError

from .. import machine
from ..result_file import read_result_file
from .baseline import Baseline
from .batch_kills import measure_batch
from .load import measure_load
from .malformed import measure_malformed
from .overload import measure_overload
from .process import Server
from .settings import PARTS, Settings

FORMAT = "serving 1"
Data = dict[str, Any]
Say = Callable[[str], None]


def measure(settings: Settings, out: Path, say: Say = lambda line: None) -> Data:
    """Measure and write `out`; parts that are in the file and are not measured now are kept.

    Args:
        settings: What to measure.
        out: The JSON file.
        say: Called with a line of progress.

    Returns:
        The content of the file: for each part its figures with the date, the machine and the settings of their measurement.

    Raises:
        InputError: A part is unknown, or `out` is another file.
        PgfastError: The server or the batch command failed.
    """
    if unknown := [name for name in settings.parts if name not in PARTS]:
        raise InputError(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    data: Data = read(out) if out.exists() else {"format": FORMAT, "parts": {}}
    settings.work.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        if name not in settings.parts:
            continue
        say(f"{name}...")
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        data["parts"][name] = {"date": date, "machine": machine.describe(), "settings": _told(settings)} | _part(
            name, settings, say
        )
        _write(data, out)
    return data


def read(path: Path) -> Data:
    """Read a result file (raises as `read_result_file`)."""
    return read_result_file(path, "pgfast bench serve", FORMAT)


def _part(name: str, settings: Settings, say: Say) -> dict[str, Any]:
    if name == "batch":
        return measure_batch(settings, settings.work / "batch", say)
    model = ("--model", settings.model) if settings.model else ()
    own = {"overload": settings.overload_flags, "malformed": settings.malformed_flags}.get(name, ())
    flags = (*settings.serve_flags, *own)
    with Server([*settings.serve, *model, *flags], settings.work / f"{name}.log") as server:
        try:
            figures = _figures(name, settings, server, say)
        except PgfastError as error:
            code = server.ended(1.0)
            if code is None:
                raise
            raise PgfastError(f"the server ended with code {code} during {name}: {server.last_words()}") from error
        return figures | {"start_seconds": server.start_seconds, "flags": list(flags), "stop_seconds": server.close()}


def _figures(name: str, settings: Settings, server: Server, say: Say) -> dict[str, Any]:
    if name == "overload":
        return measure_overload(settings, server)
    with Baseline(settings.model, settings.seed) as baseline:
        if name == "load":
            return measure_load(settings, server, baseline)
        (wanted,) = baseline.answer(0, 1).texts
    return measure_malformed(settings, server, wanted, say)


def _told(settings: Settings) -> dict[str, Any]:
    return {k: v for k, v in asdict(settings).items() if k not in ("work", "serve", "batch", "parts")}


def _write(data: Data, out: Path) -> None:
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(out)
