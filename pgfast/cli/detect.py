"""`pgfast detect`."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from pgfast.cli import printable
from pgfast.cli.options import decoding_options, engine_options, generate_options, load_engine
from pgfast.errors import InputError

FORMATS = ("text", "coco", "json", "csv")


@click.command()
@click.argument("image")
@click.argument("labels", nargs=-1, required=True)
@click.option("-o", "--output", metavar="PICTURE", help="Also draw the boxes; the ending says the format. A file is replaced.")
@click.option("--format", "kind", type=click.Choice(FORMATS), help="What to print; by default text.")
@click.option("--min-score", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Leave out less probable boxes.")
@engine_options
@decoding_options
def detect(
    image: str,
    labels: tuple[str, ...],
    output: str | None,
    kind: str | None,
    min_score: float,
    model: str | None,
    provider: str,
    threads: int | None,
    as_json: bool,
    **decoding: Any,
) -> None:
    """Find LABELS in the picture IMAGE (a file, or - for stdin), for example: detect street.jpg car "traffic light".

    Boxes are in pixels of the picture, turned upright. Scores are products of token probabilities: small numbers that rank.
    """
    from pgfast.detection_formats import json_text, to_coco, to_csv, to_json, to_text
    from pgfast.image import open_image
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
    detections = engine.detect(picture, listed, options=generate_options(decoding))
    found = [detection for detection in detections if detection.score >= min_score]
    for problem in detections.problems:
        print(f"pgfast: {printable(problem)}", file=sys.stderr)
    if not found:
        print("pgfast: nothing found" + (f" with a score of {min_score} or more" if detections else ""), file=sys.stderr)
    name = os.fsencode(image).decode(errors="replace")
    if kind == "text":
        if found:
            print(to_text(found))
    elif kind == "csv":
        print(to_csv(found, name))
    else:
        print(json_text(to_json(detections, found) if kind == "json" else to_coco(detections, found, listed, name)))
    if output is not None:
        from pgfast.drawing import draw_detections, save_picture

        save_picture(draw_detections(picture, found), output)
        print(f"pgfast: drawn into {printable(output)}", file=sys.stderr)


def check_output(output: str, image: str) -> None:
    """Refuse what could be known before the model is loaded: a format that is not written, the picture itself."""
    from pgfast.drawing import output_format

    output_format(output)
    if os.path.exists(output) and os.path.exists(image) and os.path.samefile(output, image):
        raise InputError(f"{output} is the picture itself: choose another name for the drawing")
