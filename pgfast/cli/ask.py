"""`pgfast answer` and `pgfast generate`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from pgfast.cli.options import decoding_options, engine_options, generate_options, load_engine, print_answer


@click.command()
@click.argument("image")
@click.argument("question")
@click.option("--choices", help="Score exactly these answers, separated by commas, and print the most probable one.")
@click.option("--language", default="en", show_default=True, help="Language code of the answer.")
@engine_options
@decoding_options
def answer(
    image: str,
    question: str,
    choices: str | None,
    language: str,
    model: str | None,
    provider: str,
    threads: int | None,
    as_json: bool,
    **decoding: Any,
) -> None:
    """Answer QUESTION about the picture IMAGE (a file, or - for stdin)."""
    engine = load_engine(model, provider, threads)
    listed = [choice.strip() for choice in choices.split(",")] if choices is not None else None
    options = generate_options(decoding)
    print_answer(engine.answer(_picture(image), question, choices=listed, language=language, options=options), as_json)


@click.command()
@click.argument("image")
@click.argument("prompt")
@click.option("--stream", is_flag=True, help="Print the text as it comes.")
@engine_options
@decoding_options
def generate(
    image: str,
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
    options = generate_options(decoding)
    if not stream:
        print_answer(engine.generate(_picture(image), prompt, options=options), as_json)
        return
    for piece in engine.stream(_picture(image), prompt, options=options):
        print(json.dumps({"text": piece}, ensure_ascii=False) if as_json else piece, end="\n" if as_json else "", flush=True)
    if not as_json:
        print()


def _picture(image: str) -> str | bytes:
    return sys.stdin.buffer.read() if image == "-" else image
