"""How well a bundle knows the demo's tasks, on scenes that training never draws.

`python -m pgfast.train.demo.score [BUNDLE]` prints JSON: exact captions, boxes (mean IoU, precision, recall, F1 at IoU 0.5),
right counts and other answers, and easy-VQA's test split.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

import pgfast
from pgfast.engine import Engine
from pgfast.types import Detection

from . import easy_vqa_data
from .scene_questions import Asked, is_called, questions
from .scenes import Thing, make_scene

SEED = 1
"""Of the scenes; those of training have 0, those of the tower a million and more."""
MATCH = 0.5
"""IoU from which a box counts as found."""


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (areas - shared) if areas > shared else 0.0


def matches(found: Sequence[Detection], wanted: Sequence[tuple[str, Sequence[float]]]) -> list[float]:
    """Pair boxes of equal labels, those that fit best first; return each pair's IoU."""
    pairs = sorted(
        ((iou(detection.box, box), i, j) for i, detection in enumerate(found) for j, (label, box) in enumerate(wanted)
         if detection.label == label),
        reverse=True,
    )  # fmt: skip
    taken: tuple[set[int], set[int]] = (set(), set())
    ious = []
    for overlap, i, j in pairs:
        if i not in taken[0] and j not in taken[1] and overlap > 0:
            taken[0].add(i)
            taken[1].add(j)
            ious.append(overlap)
    return ious


def wanted_boxes(things: Sequence[Thing], labels: Sequence[str]) -> list[tuple[str, list[float]]]:
    """Return what has to be found: label and box x0, y0, x1, y1."""
    boxes = [(label, thing.box) for label in labels for thing in things if is_called(thing, label)]
    return [(label, [float(left), float(top), float(right), float(bottom)]) for label, (top, left, bottom, right) in boxes]


def score_scenes(engine: Engine, scenes: int = 1000) -> dict[str, Any]:
    """Ask everything about new scenes.

    Args:
        engine: Answers.
        scenes: How many.
    """
    texts = sorted(set(easy_vqa_data.load("test").texts))
    right: dict[str, list[bool]] = defaultdict(list)
    ious: list[float] = []
    found_count = wanted_count = 0
    for number in range(scenes):
        scene = make_scene(SEED, number)
        picture = engine.encode_image(scene.draw())
        for asked in questions(scene.things, texts, np.random.default_rng([SEED, number])):
            if asked.kind.startswith("detect"):
                labels = asked.text.removeprefix("detect ").split(" ; ")
                found, wanted = engine.detect(picture, labels), wanted_boxes(scene.things, labels)
                ious += matches(found, wanted)
                found_count, wanted_count = found_count + len(found), wanted_count + len(wanted)
                if asked.kind == "detect absent":
                    right[asked.kind].append(not found)
            else:
                right[asked.kind].append(_said(engine, picture, asked) == asked.answer)
    hits = sum(overlap >= MATCH for overlap in ious)
    precision, recall = hits / max(found_count, 1), hits / wanted_count
    return {
        "scenes": scenes,
        "exact captions": float(np.mean(right["caption"])),
        "boxes": wanted_count,
        "mean IoU": sum(ious) / wanted_count,
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "right by kind": {kind: round(float(np.mean(values)), 4) for kind, values in sorted(right.items())},
    }


def score_easy_vqa(engine: Engine) -> float:
    """Return the share of right answers on easy-VQA's test split."""
    test = easy_vqa_data.load("test")
    encoded = [engine.encode_image(image) for image in test.images]
    pairs = [(encoded[picture], text) for picture, text in zip(test.image_index, test.texts, strict=True)]
    return float(np.mean([a.text == b for a, b in zip(engine.answer_batch(pairs), test.answers, strict=True)]))


def _said(engine: Engine, picture: Any, asked: Asked) -> str:
    if asked.is_prompt:
        return engine.generate(picture, asked.text).text
    return engine.answer(picture, asked.text).text


if __name__ == "__main__":
    with pgfast.load(sys.argv[1] if len(sys.argv) > 1 else None) as engine:
        print(json.dumps({**score_scenes(engine), "easy-VQA": score_easy_vqa(engine)}, indent=2))  # noqa: T201
