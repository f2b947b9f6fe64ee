"""The pictures of a command: files, stdin, or the frames of a video."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pgfast.errors import InputError
from pgfast.image_files import MAX_FILE
from pgfast.video import is_video, read_frames

if TYPE_CHECKING:
    from pgfast.engine import Engine

F = TypeVar("F", bound=Callable[..., Any])
USUAL_FRAMES = 8


def picture_arguments(command: F) -> F:
    """Add IMAGE... and --frames; the command takes them as `images` and `frames`."""
    for option in (
        click.option("--frames", type=int, help=f"Frames to take of a video, evenly [default: up to {USUAL_FRAMES}]."),
        click.argument("images", metavar="IMAGE...", nargs=-1, required=True),
    ):
        command = option(command)
    return command


def read_pictures(images: tuple[str, ...], frames: int | None, engine: Engine) -> Any:
    """Return what the engine takes for IMAGE...: one picture, or a list for one prompt.

    Args:
        images: Paths; - is stdin. One may be a video, then it stands alone.
        frames: Of a video; None: as many as are usual and as the bundle takes.
        engine: Says how many.

    Raises:
        InputError: --frames without a video, a video among pictures, more frames than the bundle takes, a bad video,
            stdin twice or closed.
    """
    if any(map(is_video, images)) or frames is not None:
        if len(images) > 1 or images[0] == "-":
            raise InputError("a video is given alone, by its path")
        most = engine.manifest.limits.images
        if frames is not None and frames > most:
            raise InputError(
                f"--frames {frames}: this bundle takes at most {most} picture{'s' * (most > 1)} (pgfast export --max-images)"
            )
        return read_frames(images[0], min(USUAL_FRAMES, most) if frames is None else frames)
    if images.count("-") > 1:
        raise InputError("- can be given once: stdin holds one picture")
    if "-" in images and sys.stdin is None:
        raise InputError("- is stdin, which is closed")
    # one byte more than is accepted: what never ends is refused, too
    pictures = [sys.stdin.buffer.read(MAX_FILE + 1) if image == "-" else image for image in images]
    return pictures if len(pictures) > 1 else pictures[0]
