"""`pgfast segment`."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from pgfast.cli import printable
from pgfast.cli.detect import check_output
from pgfast.cli.options import decoding_options, engine_options, generate_options, load_engine
from pgfast.errors import InputError


@click.command()
@click.argument("image")
@click.argument("labels", nargs=-1, required=True)
@click.option(
    "-o", "--output", metavar="PICTURE", help="Also draw masks and boxes; the ending says the format. A file is replaced."
)
@click.option("--format", "kind", type=click.Choice(("text", "coco", "json")), help="What to print; by default text.")
@engine_options
@decoding_options
def segment(
    image: str,
    labels: tuple[str, ...],
    output: str | None,
    kind: str | None,
    model: str | None,
    provider: str,
    threads: int | None,
    as_json: bool,
    **decoding: Any,
) -> None:
    """Find LABELS in the picture IMAGE (a file, or - for stdin) with their masks, for example: segment street.jpg car.

    Masks are of the picture, turned upright; JSON holds them as COCO's run lengths. They need a bundle with a mask decoder.
    """
    from pgfast.detection_formats import json_text
    from pgfast.image import open_image
    from pgfast.masks import MASK_DECODER, draw_segments
    from pgfast.segment_formats import to_coco, to_json, to_text
    from pgfast.tasks import split_labels

    if as_json and kind not in (None, "json"):
        raise InputError(f"--json and --format {kind} exclude each other")
    kind = "json" if as_json else kind or "text"
    listed = split_labels(labels[0] if len(labels) == 1 else labels)
    if output is not None:
        check_output(output, image)
    engine = load_engine(model, provider, threads)
    picture: Any = sys.stdin.buffer.read() if image == "-" else image
    if output is not None:
        picture = open_image(picture)  # once, for the model and for the drawing
    segments = engine.segment(picture, listed, options=generate_options(decoding))
    for problem in segments.problems:
        print(f"pgfast: {printable(problem)}", file=sys.stderr)
    if not segments:
        print("pgfast: nothing found", file=sys.stderr)
    if MASK_DECODER not in engine.manifest.graphs:
        print(
            "pgfast: this bundle has no mask decoder, so boxes come without masks: "
            "'pgfast export BUNDLE NEW_BUNDLE --mask-decoder vae-oid.npz' adds one (big_vision has the file)",
            file=sys.stderr,
        )
    if kind == "json":
        print(json_text(to_json(segments)))
    elif kind == "coco":
        print(json_text(to_coco(segments, listed, os.fsencode(image).decode(errors="replace"))))
    elif segments:
        print(to_text(segments))
    if output is not None:
        from pgfast.drawing import save_picture

        save_picture(draw_segments(picture, segments), output)
        print(f"pgfast: drawn into {printable(output)}", file=sys.stderr)
