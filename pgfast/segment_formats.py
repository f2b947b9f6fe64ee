"""Segments as text for people, JSON and COCO's JSON; masks as COCO's run lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pgfast import detection_formats
from pgfast.masks import Mask, to_rle
from pgfast.types import Segment, Segments


def to_text(segments: Sequence[Segment]) -> str:
    """One line per object: `cat: x 12.5 to 40, y 8 to 40.2, score 0.42, mask of 512 pixels`."""
    lines = detection_formats.to_text(segments).splitlines()
    return "\n".join(f"{line}, {_mask_text(segment.mask)}" for line, segment in zip(lines, segments, strict=True))


def to_json(segments: Segments) -> dict[str, Any]:
    """Everything: objects with boxes x0, y0, x1, y1 and masks, the picture's size, problems and the model's own answer."""
    return {
        "width": segments.width,
        "height": segments.height,
        "segments": [
            {"label": s.label, "box": s.box, "score": s.score, "mask": None if s.mask is None else to_rle(s.mask)}
            for s in segments
        ],
        "problems": list(segments.problems),
        "answer": dataclasses.asdict(segments.answer),
    }


def to_coco(segments: Segments, labels: Sequence[str], file_name: str) -> dict[str, Any]:
    """COCO's dataset of one picture, as `detection_formats.to_coco` makes it, with `segmentation` where there is a mask."""
    document = detection_formats.to_coco(segments, segments, labels, file_name)
    for annotation, segment in zip(document["annotations"], segments, strict=True):
        if segment.mask is not None:
            annotation |= {"segmentation": to_rle(segment.mask), "area": int(segment.mask.sum())}
    return document


def _mask_text(mask: Mask | None) -> str:
    return "no mask" if mask is None else f"mask of {int(mask.sum())} pixels"
