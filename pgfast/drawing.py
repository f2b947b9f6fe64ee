"""Boxes with their labels on a picture, and pictures into files."""

from __future__ import annotations

import colorsys
import contextlib
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgfast.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from PIL.ImageDraw import ImageDraw

    from pgfast.types import Detection

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}
"""By ending of the file."""

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]
"""left, top, right, bottom; the last two are the first pixels outside."""

INK: Color = (0, 0, 0)
"""Of text, and of the thin lines on both sides of a box, which show it on a background of its own colour."""


def label_colors(labels: Sequence[str]) -> dict[str, Color]:
    """Return a colour for each label, bright enough for black text on it; neighbours are the most different ones."""
    # steps of the golden ratio: however many there are, none comes close to one that was just taken
    hues = {label: (0.13 + i * 0.618034) % 1 for i, label in enumerate(dict.fromkeys(labels))}
    return {label: _color(hue) for label, hue in hues.items()}


def draw_detections(picture: PILImage, detections: Sequence[Detection]) -> PILImage:
    """Draw boxes with labels; lines stay inside their box, labels inside the picture.

    Lines and letters grow with the picture. Letters that Pillow's own font lacks are drawn as empty boxes.

    Args:
        picture: RGB, upright; it stays as it is.
        detections: Boxes in its pixels.
    """
    from PIL import ImageDraw, ImageFont

    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    side = min(drawn.size)
    line, font = max(1, round(side / 250)), ImageFont.load_default(max(10, round(side / 32)))
    colors = label_colors([detection.label for detection in detections])
    boxes = [_pixels(detection.box, *drawn.size) for detection in detections]
    for detection, box in zip(detections, boxes, strict=True):
        _draw_box(draw, box, colors[detection.label], line)
    for detection, box in zip(detections, boxes, strict=True):  # over all lines
        _draw_label(draw, box, detection.label, colors[detection.label], font, drawn.size)
    return drawn


def output_format(path: str | os.PathLike[str]) -> str:
    """Return Pillow's name of the format that a file's ending says.

    Raises:
        InputError: No ending, or one that is not written.
    """
    try:
        return FORMATS[Path(path).suffix.lower()]
    except KeyError:
        raise InputError(f"{os.fspath(path)}: the ending says the format, one of {', '.join(FORMATS)}") from None


def save_picture(picture: PILImage, path: str | os.PathLike[str]) -> None:
    """Write a picture in the format that the file's ending says; a file of that name is replaced, whole or not at all.

    Raises:
        InputError: The ending is unknown, or the file cannot be written.
    """
    kind, path = output_format(path), Path(path)
    partial = path.with_name(f".pgfast-{secrets.token_hex(8)}.partial")
    options: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    try:
        try:
            with open(partial, "xb") as file:
                picture.save(file, kind, **options)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path, a side too long for the format
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path} cannot be written: {reason}") from error


def _color(hue: float) -> Color:
    red, green, blue = colorsys.hls_to_rgb(hue, 0.72, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _pixels(box: tuple[float, float, float, float], width: int, height: int) -> Rectangle:
    """Return all pixels that the box touches, at least one and none outside the picture."""
    x0, y0, x1, y1 = box
    left, top = min(max(math.floor(x0), 0), width - 1), min(max(math.floor(y0), 0), height - 1)
    return left, top, max(left + 1, min(math.ceil(x1), width)), max(top + 1, min(math.ceil(y1), height))


def _draw_box(draw: ImageDraw, box: Rectangle, color: Color, line: int) -> None:
    left, top, right, bottom = box
    edge = max(1, line // 3)
    for size, paint in ((edge, INK), (line, color), (edge, INK)):  # from outside to inside
        for part in (
            (left, top, right, min(top + size, bottom)),
            (left, max(bottom - size, top), right, bottom),
            (left, top, min(left + size, right), bottom),
            (max(right - size, left), top, right, bottom),
        ):
            # not Pillow's own outlines: they leave boxes that are thinner than the line
            if part[0] < part[2] and part[1] < part[3]:
                draw.rectangle((part[0], part[1], part[2] - 1, part[3] - 1), fill=paint)
        left, top, right, bottom = left + size, top + size, right - size, bottom - size


def _draw_label(draw: ImageDraw, box: Rectangle, label: str, color: Color, font: Any, size: tuple[int, int]) -> None:
    """Write on a plate above the box; where there is no room, inside it; moved so far that it is inside the picture."""
    shown = " ".join("".join(char if char.isprintable() else " " for char in label).split())
    ascent, descent = font.getmetrics()
    pad = max(1, ascent // 6)
    height = ascent + descent + 2 * pad
    while shown and math.ceil(draw.textlength(shown, font)) + 2 * pad > size[0]:
        shown = "" if shown == "…" else f"{shown.rstrip('…')[:-1].rstrip()}…"
    width = math.ceil(draw.textlength(shown, font)) + 2 * pad
    if not shown or height > size[1]:
        return
    left = min(box[0], size[0] - width)
    top = box[1] - height if box[1] >= height else min(box[1], size[1] - height)
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=color)
    draw.text((left + pad, top + pad + ascent), shown, fill=INK, font=font, anchor="ls")
