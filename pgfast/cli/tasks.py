"""`pgfast caption`, `pgfast ocr` and `pgfast question`."""

from __future__ import annotations

from typing import Any

import click

from pgfast.cli.options import decoding_options, engine_options, generate_options, load_engine, print_answer
from pgfast.cli.pictures import picture_arguments, read_pictures


@click.command()
@picture_arguments
@click.option(
    "--style",
    type=click.Choice(["cap", "caption", "describe"]),
    default="caption",
    show_default=True,
    help="Raw and short, one sentence, or longer.",
)
@click.option("--language", default="en", show_default=True, help="Language code of the caption.")
@engine_options
@decoding_options
def caption(
    images: tuple[str, ...],
    frames: int | None,
    style: Any,
    language: str,
    model: str | None,
    provider: str,
    threads: int | None,
    as_json: bool,
    **decoding: Any,
) -> None:
    """Describe the picture IMAGE (a file, or - for stdin), several pictures together, or a short video."""
    engine = load_engine(model, provider, threads)
    pictures = read_pictures(images, frames, engine)
    print_answer(engine.caption(pictures, style=style, language=language, options=generate_options(decoding)), as_json)


@click.command()
@picture_arguments
@engine_options
@decoding_options
def ocr(
    images: tuple[str, ...],
    frames: int | None,
    model: str | None,
    provider: str,
    threads: int | None,
    as_json: bool,
    **decoding: Any,
) -> None:
    """Read the text in the picture IMAGE (a file, or - for stdin)."""
    engine = load_engine(model, provider, threads)
    print_answer(engine.ocr(read_pictures(images, frames, engine), options=generate_options(decoding)), as_json)


@click.command()
@picture_arguments
@click.argument("answer")
@click.option("--language", default="en", show_default=True, help="Language code of the question.")
@engine_options
@decoding_options
def question(
    images: tuple[str, ...],
    frames: int | None,
    answer: str,
    language: str,
    model: str | None,
    provider: str,
    threads: int | None,
    as_json: bool,
    **decoding: Any,
) -> None:
    """Make up a question about the picture IMAGE (a file, or - for stdin) that has this ANSWER."""
    engine = load_engine(model, provider, threads)
    pictures = read_pictures(images, frames, engine)
    print_answer(engine.question(pictures, answer, language=language, options=generate_options(decoding)), as_json)
