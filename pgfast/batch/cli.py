"""`pgfast batch`."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgfast.cli import printable
from pgfast.cli.options import decoding_options, engine_options, generate_options, load_engine
from pgfast.errors import InputError
from pgfast.scale.cluster import Cluster, ray_options

from .cli_progress import Progress
from .journal import Journal, check_out, describe_run
from .rows import Defaults, Result, Survey
from .sources import Source, open_source

if TYPE_CHECKING:
    from pgfast.types import GenerateOptions

_NAMED = 20
"""Keys that nobody reads, in the message."""


@click.command()
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--question", help="For pictures of a folder, and rows without a question or prompt.")
@click.option("--prompt", help="The same as a raw prompt, without the bundle's template.")
@click.option("--language", default="en", show_default=True, help="Language code of the answers, unless a row says.")
@click.option("--timings", is_flag=True, help="Write how long each answer took; no two runs write the same then.")
@click.option("--max-errors", type=click.IntRange(1), metavar="N", help="Stop when OUT has so many error rows.")
@ray_options
@engine_options
@decoding_options
def batch(
    source: str,
    out: Path,
    question: str | None,
    prompt: str | None,
    language: str,
    timings: bool,
    max_errors: int | None,
    model: str | None,
    provider: str,
    threads: int | None,
    as_json: bool,
    **others: Any,
) -> int:
    """Answer all rows of IN into OUT.

    IN is a .jsonl or .csv file with the columns image, question or prompt, and perhaps id, choices and language; or a
    folder of pictures; or - for JSONL from stdin. OUT is a .jsonl or .csv file, one line per row in the same order. After
    an end of any kind the same command goes on where it was. Exits with 1 if rows failed; OUT says why.
    """
    if question is not None and prompt is not None:
        raise click.UsageError("give --question or --prompt, not both")
    if any(text is not None and not text.strip() for text in (question, prompt)):
        raise click.UsageError("the question is empty")
    check_out(out)
    cluster = Cluster.of(others, model, provider, threads)
    started = time.perf_counter()
    rows = open_source(source, Defaults(question, prompt, language))
    if os.path.exists(out) and os.path.exists(source) and os.path.samefile(source, out):
        raise InputError(f"{out} is IN: give another OUT")
    options, survey = generate_options(others), rows.survey()
    run = describe_run(rows, survey, model, options, timings=timings)
    with Journal(out, run, timings=timings) as journal:
        before = journal.rows
        if journal.finished:
            print(f"pgfast: {out} is complete already", file=sys.stderr)
        elif max_errors is None or journal.errors < max_errors:
            try:
                if cluster is None:
                    results = _results(rows, before, model, provider, threads, options)
                else:
                    from pgfast.scale.batch import answer_on_ray

                    results = answer_on_ray(rows.rows(before), cluster, options=options)
                _run(journal, survey, results, max_errors)
            except KeyboardInterrupt:
                journal.recount()
                print(f"pgfast: {journal.rows:,} rows are in {out}; the same command goes on", file=sys.stderr)
                raise
        _report(journal, out, before, rows.ignored, time.perf_counter() - started, as_json)
        return 1 if journal.errors else 0


def _results(
    rows: Source, skip: int, model: str | None, provider: str, threads: int | None, options: GenerateOptions
) -> Generator[Result]:
    from .answering import answer_rows

    with (
        _without_warnings("pgfast.prompt"),  # what it says about single questions would be too much here
        load_engine(model, provider, threads) as engine,
        closing(answer_rows(engine, rows.rows(skip), options=options)) as results,
    ):
        yield from results


@contextmanager
def _without_warnings(name: str) -> Generator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _run(journal: Journal, survey: Survey, results: Generator[Result], max_errors: int | None) -> None:
    """Append results until there are no more, or too many errors."""
    with closing(results), Progress(survey.rows, journal.rows) as progress:
        for result in results:
            journal.append(result)
            progress.update(journal.rows, journal.errors)
            if journal.errors == max_errors:
                return
        journal.finish()


def _report(journal: Journal, out: Path, before: int, ignored: set[str], seconds: float, as_json: bool) -> None:
    if ignored:
        print(f"pgfast: passed over: {printable(', '.join(sorted(ignored)[:_NAMED]))}", file=sys.stderr)
    state = "" if journal.finished else "; it stopped there, because of --max-errors"
    print(f"pgfast: {out} has {journal.rows:,} rows, {journal.errors:,} of them errors{state}", file=sys.stderr)
    if as_json:
        summary = {"rows": journal.rows, "errors": journal.errors, "finished": journal.finished}
        print(json.dumps(summary | {"answered_now": journal.rows - before, "seconds": round(seconds, 3)}, indent=2))
