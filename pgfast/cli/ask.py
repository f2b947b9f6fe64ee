"""`pgfast answer` and `pgfast generate`."""

from __future__ import annotations

import json
from typing import Any

import click

from pgfast.cli.options import decoding_options, engine_options, generate_options, load_engine, print_answer
from pgfast.cli.pictures import picture_arguments, read_pictures


@click.command()
@picture_arguments
@click.argument("question")
@click.option("--choices", help="Score exactly these answers, separated by commas, and print the most probable one.")
@click.option("--language", default="en", show_default=True, help="Language code of the answer.")
@engine_options
@decoding_options
def answer(
    images: tuple[str, ...],
    frames: int | None,
    question: str,
    choices: str | None,
    language: str,
    model: str | None,
    provider: str,
    threads: int | None,
    as_json: bool,
    **decoding: Any,
) -> None:
    """Answer QUESTION about the picture IMAGE (a file, or - for stdin), several pictures together, or a short video."""
    engine = load_engine(model, provider, threads)
    listed = [choice.strip() for choice in choices.split(",")] if choices is not None else None
    options, pictures = generate_options(decoding), read_pictures(images, frames, engine)
    print_answer(engine.answer(pictures, question, choices=listed, language=language, options=options), as_json)


@click.command()
@picture_arguments
@click.argument("prompt")
@click.option("--stream", is_flag=True, help="Print the text as it comes.")
@engine_options
@decoding_options
def generate(
    images: tuple[str, ...],
    frames: int | None,
    prompt: str,
    stream: bool,
    model: str | None,
    provider: str,
    threads: int | None,
    as_json: bool,
    **decoding: Any,
) -> None:
    """Continue a raw PROMPT about the picture IMAGE, for example "caption en"; no template is put around it."""
    engine = load_engine(model, provider, threads)
    options, pictures = generate_options(decoding), read_pictures(images, frames, engine)
    if not stream:
        print_answer(engine.generate(pictures, prompt, options=options), as_json)
        return
    for piece in engine.stream(pictures, prompt, options=options):
        print(json.dumps({"text": piece}, ensure_ascii=False) if as_json else piece, end="\n" if as_json else "", flush=True)
    if not as_json:
        print()
