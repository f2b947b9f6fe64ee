"""Options that mean the same in every command."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pgfast.types import Answer, GenerateOptions

if TYPE_CHECKING:
    from pgfast.engine import Engine

F = TypeVar("F", bound=Callable[..., Any])


def engine_options(command: F) -> F:
    """Add -m/--model, --provider, --threads and --json."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
        click.option("--threads", type=int, help="CPU threads; by default one per core."),
        click.option("--provider", default="auto", show_default=True, help="auto, cpu, cuda, tensorrt or tensorrt-rtx."),
        click.option("-m", "--model", metavar="BUNDLE", envvar="PGFAST_MODEL", help="Bundle folder [env: PGFAST_MODEL]."),
    ):
        command = option(command)
    return command


def decoding_options(command: F) -> F:
    """Add the fields of `GenerateOptions`; the command takes them as keyword arguments."""
    for option in (
        click.option("--min-confidence", type=float, metavar="P", help="Answer 'unsure' below this confidence, 0 to 1."),
        click.option("--repetition-penalty", type=float, default=1.0, help="Above 1: less of what was said already."),
        click.option("--length-penalty", type=float, default=1.0, help="With --beams: more prefers longer texts."),
        click.option("--beams", type=int, default=1, help="Search for the most probable text with so many beginnings."),
        click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends the answer; repeatable."),
        click.option("--seed", type=int, help="Makes sampling repeatable."),
        click.option("--top-k", type=int, default=0, help="Sample from this many most probable tokens."),
        click.option("--top-p", type=float, default=1.0, help="Sample from the tokens that hold this much probability."),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
        click.option("--max-new-tokens", type=int, help="Longest answer; by default the bundle's limit."),
    ):
        command = option(command)
    return command


def generate_options(values: dict[str, Any]) -> GenerateOptions:
    """Build `GenerateOptions` from a command's keyword arguments."""
    return GenerateOptions(**{field.name: values[field.name] for field in dataclasses.fields(GenerateOptions)})


def load_engine(model: str | None, provider: str, threads: int | None, *, spin: bool = True) -> Engine:
    """Load the bundle and say on stderr what answers and where."""
    import pgfast
    from pgfast.cli import printable

    engine = pgfast.load(model, provider=provider, threads=threads, spin=spin)
    what = printable(engine.manifest.source.checkpoint)
    if model is None:
        what = "the embedded demo model (it knows pictures of coloured shapes only; -m BUNDLE for your own)"
    print(f"pgfast: {what}, on {engine.provider}", file=sys.stderr)
    return engine


def print_answer(answer: Answer, as_json: bool) -> None:
    """Print the text alone, or everything as JSON."""
    print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False, indent=2) if as_json else answer.text)
