"""What can be asked about a picture whose shapes are known, and the right answers: captions, boxes, counts, and easy-VQA's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .easy_vqa_data import COLORS, SHAPES, kind_of
from .scenes import Box, Thing
from .tiny_paligemma import IMAGE_SIZE

BINS = 1024
"""Location tokens along a side."""
CAPTION = "caption en"
COUNT = "how many shapes are there?"
_NEGATED = re.compile(r"\b(no|not)\b")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with its answer."""

    text: str
    answer: str
    """May be empty: nothing that was to be detected is there."""
    kind: str
    """What is asked, for drawing and for reports."""
    is_prompt: bool = False
    """The text is the whole prompt."""


def caption(things: Sequence[Thing]) -> str:
    """Name the things from left to right: `a red circle, a gray triangle and a teal rectangle`."""
    names = [f"a {thing.name}" for thing in things]
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def location(box: Box) -> str:
    """Return a box as four location tokens; the picture's far edge is the last bin, 1023."""
    return "".join(f"<loc{min(edge * BINS // IMAGE_SIZE, BINS - 1):04d}>" for edge in box)


def is_called(thing: Thing, label: str) -> bool:
    """Say whether a label fits: a shape, or a colour and a shape."""
    return label in (thing.name, SHAPES[thing.shape])


def detection(things: Sequence[Thing], labels: Sequence[str]) -> str:
    """Name every box of every label: in the order of the labels, those of one label from left to right."""
    found = [f"{location(thing.box)} {label}" for label in labels for thing in things if is_called(thing, label)]
    return " ; ".join(found)


def detect(things: Sequence[Thing], labels: Sequence[str]) -> Asked:
    """Ask for the boxes of some labels."""
    answer = detection(things, labels)
    return Asked(f"detect {' ; '.join(labels)}", answer, "detect present" if answer else "detect absent", is_prompt=True)


def easy_answer(question: str, things: Sequence[Thing]) -> str | None:
    """Answer one of easy-VQA's questions about a picture of one or several things; None: it has no single answer."""
    named = re.findall(r"\w+", question)
    fits = [thing for thing in things if {SHAPES[thing.shape], COLORS[thing.color]} >= {*named} & {*SHAPES, *COLORS}]
    if question.startswith("what"):
        values = {COLORS[thing.color] if "color" in named else SHAPES[thing.shape] for thing in fits}
        return values.pop() if len(values) == 1 else None
    return "yes" if bool(fits) != bool(_NEGATED.search(question)) else "no"


def questions(things: Sequence[Thing], easy: Sequence[str], rng: np.random.Generator) -> list[Asked]:
    """Ask about a picture.

    Args:
        things: What it shows, from left to right.
        easy: Questions of easy-VQA to choose from, each as often as it shall be asked.
        rng: Source of the choices.
    """
    asked = [Asked(CAPTION, caption(things), "caption", is_prompt=True), *_detections(things, rng), *_counts(things, rng)]
    for number in rng.choice(len(easy), size=6):
        answer = easy_answer(easy[number], things)
        if answer is not None:
            asked.append(Asked(easy[number], answer, kind_of(easy[number], answer)))
    name = _some_name(things, rng)
    asked.append(Asked(f"is there a {name}?", "yes" if any(is_called(t, name) for t in things) else "no", "thing"))
    if len(things) > 1:
        side = int(rng.integers(2))
        asked.append(Asked(f"what is on the {('left', 'right')[side]}?", things[-side].name, "side"))
    return list(dict.fromkeys(asked))


def _detections(things: Sequence[Thing], rng: np.random.Generator) -> list[Asked]:
    """One thing, a shape, and two labels of which one may not be there."""
    there = [thing.name for thing in things]
    pair = (str(rng.choice(there)), _some_name(things, rng))
    two = dict.fromkeys(pair if rng.integers(2) else pair[::-1])
    labels = ([str(rng.choice(there))], [str(rng.choice(SHAPES))], list(two), [_absent(things, rng)])
    return [detect(things, some) for some in labels]


def _counts(things: Sequence[Thing], rng: np.random.Generator) -> list[Asked]:
    shape, color = str(rng.choice(SHAPES)), COLORS[int(rng.integers(len(COLORS)))]
    if rng.integers(2):
        color = COLORS[things[int(rng.integers(len(things)))].color]
    of_shape = sum(SHAPES[thing.shape] == shape for thing in things)
    of_color = sum(COLORS[thing.color] == color for thing in things)
    return [
        Asked(f"how many {shape}s are there?", str(of_shape), "count"),
        Asked(f"how many {color} shapes are there?", str(of_color), "count"),
        Asked(COUNT, str(len(things)), "count"),
    ]


def _some_name(things: Sequence[Thing], rng: np.random.Generator) -> str:
    """Name a thing that is there, or one that is not, half of the time each."""
    return things[int(rng.integers(len(things)))].name if rng.integers(2) else _absent(things, rng)


def _absent(things: Sequence[Thing], rng: np.random.Generator) -> str:
    """Name a thing that is not there; its shape and its colour may be."""
    there = {thing.name for thing in things}
    while True:
        shape, color = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLORS)))
        if rng.integers(2):  # harder: half right
            thing = things[int(rng.integers(len(things)))]
            shape, color = (thing.shape, color) if rng.integers(2) else (shape, thing.color)
        name = Thing(shape, color, (0, 0, 0, 0)).name
        if name not in there:
            return name
