"""Detections as text for people, JSON, COCO's JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

from pgfast.types import Detection, Detections, Segments


def to_text(detections: Sequence[Detection]) -> str:
    """One line per object: `cat: x 12.5 to 40, y 8 to 40.2, score 0.42`."""
    return "\n".join(
        f"{_one_line(d.label) or '(no label)'}: x {_short(d.box[0])} to {_short(d.box[2])}, "
        f"y {_short(d.box[1])} to {_short(d.box[3])}, score {d.score:.2g}"
        for d in detections
    )


def to_json(detections: Detections, found: Sequence[Detection]) -> dict[str, Any]:
    """Everything: objects with boxes x0, y0, x1, y1, the picture's size, problems and the model's own answer.

    Args:
        detections: The result.
        found: Those of its objects that are wanted.
    """
    return {
        "width": detections.width,
        "height": detections.height,
        "detections": [dataclasses.asdict(detection) for detection in found],
        "problems": list(detections.problems),
        "answer": dataclasses.asdict(detections.answer),
    }


def to_coco(
    detections: Detections | Segments, found: Sequence[Detection], labels: Sequence[str], file_name: str
) -> dict[str, Any]:
    """COCO's dataset of one picture; the list `annotations` is also what its programs read as results.

    Boxes are x, y, width, height. Categories are numbered from 1: the labels asked for, then any others that the model named.

    Args:
        detections: The result.
        found: Those of its objects that are wanted.
        labels: Those asked for.
        file_name: Of the picture.
    """
    names = list(dict.fromkeys([*labels, *(detection.label for detection in found)]))
    annotations = []
    for number, detection in enumerate(found, 1):
        x0, y0, x1, y1 = detection.box
        annotations.append(
            {
                "id": number,
                "image_id": 1,
                "category_id": names.index(detection.label) + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                "score": detection.score,
            }
        )
    return {
        "images": [{"id": 1, "file_name": file_name, "width": detections.width, "height": detections.height}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
        "annotations": annotations,
    }


def to_csv(found: Sequence[Detection], file_name: str) -> str:
    """A header and a row per object: image, label, x0, y0, x1, y1, score."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["image", "label", "x0", "y0", "x1", "y1", "score"])
    writer.writerows([file_name, detection.label, *detection.box, detection.score] for detection in found)
    return out.getvalue().rstrip("\n")


def json_text(document: dict[str, Any]) -> str:
    """Write a document as the commands print it."""
    return json.dumps(document, ensure_ascii=False, indent=2)


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _one_line(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
