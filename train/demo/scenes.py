"""Pictures of one to four shapes, drawn in the manner of easy-VQA's, whose shapes, colours and boxes are known.

A scene follows from two numbers, so a set of them needs no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .easy_vqa_data import COLORS, SHAPES
from .tiny_paligemma import IMAGE_SIZE

SCENES = 7
"""First word of the seeds of these draws."""
SCALE = 2
"""Shapes are drawn so many times larger, and averaged."""
RGB = ((0, 0, 0), (0, 0, 255), (165, 42, 42), (128, 128, 128), (0, 255, 0), (255, 0, 0), (0, 128, 128), (255, 255, 0))
"""easy-VQA's colours, in the order of `COLORS`."""
SMALLEST, LARGEST = 8, (32, 27, 23, 20)
"""Pixels of a side; the largest by the number of shapes."""
MOST_THINGS = len(LARGEST)
GAP = 2
"""Pixels between two boxes at least."""
APART = 4
"""Pixels between two middles from left to right at least: which one comes first has to be seen."""

Box = tuple[int, int, int, int]
"""Top, left, bottom, right (exclusive) in pixels."""


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape in a picture."""

    shape: int
    """Number in `SHAPES`."""
    color: int
    """Number in `COLORS`."""
    box: Box

    @property
    def name(self) -> str:
        """What it is called: `red circle`."""
        return f"{COLORS[self.color]} {SHAPES[self.shape]}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows."""

    background: tuple[int, int, int]
    things: tuple[Thing, ...]
    """From left to right by their middles."""

    def draw(self) -> NDArray[np.uint8]:
        """Return the picture, [64, 64, 3]."""
        large = Image.new("RGB", (IMAGE_SIZE * SCALE,) * 2, self.background)
        pen = ImageDraw.Draw(large)
        for thing in self.things:
            top, left, bottom, right = (SCALE * edge for edge in thing.box)
            corners = (left, top, right - 1, bottom - 1)
            color = RGB[thing.color]
            if SHAPES[thing.shape] == "circle":
                pen.ellipse(corners, fill=color)
            elif SHAPES[thing.shape] == "rectangle":
                pen.rectangle(corners, fill=color)
            else:
                pen.polygon([(left, bottom - 1), ((left + right - 1) / 2, top), (right - 1, bottom - 1)], fill=color)
        return np.asarray(large.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))


def make_scene(seed: int, number: int) -> Scene:
    """Draw a scene by lot.

    Args:
        seed: Of the set of scenes.
        number: Of the scene in its set; what it holds is independent of the others.
    """
    rng = np.random.default_rng([SCENES, seed, number])
    count = int(rng.integers(1, MOST_THINGS + 1))
    while True:
        things: list[Thing] = []
        for _ in range(20 * count):
            if len(things) == count:
                red, green, blue = (int(part) for part in rng.integers(230, 256, size=3))
                return Scene((red, green, blue), tuple(sorted(things, key=_middle)))
            thing = _thing(rng, LARGEST[count - 1])
            if all(_apart(thing, other) for other in things):
                things.append(thing)


def _thing(rng: np.random.Generator, largest: int) -> Thing:
    shape, color = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLORS)))
    width, height = (int(side) for side in rng.integers(SMALLEST, largest + 1, size=2))
    if SHAPES[shape] == "circle":
        height = width
    elif SHAPES[shape] == "triangle":  # equilateral
        height = round(width * 3**0.5 / 2)
    top, left = int(rng.integers(IMAGE_SIZE - height + 1)), int(rng.integers(IMAGE_SIZE - width + 1))
    return Thing(shape, color, (top, left, top + height, left + width))


def _middle(thing: Thing) -> int:
    """Return twice the middle of a thing from left to right."""
    return thing.box[1] + thing.box[3]


def _apart(a: Thing, b: Thing) -> bool:
    (top, left, bottom, right), (top2, left2, bottom2, right2) = a.box, b.box
    beside = right + GAP <= left2 or right2 + GAP <= left or bottom + GAP <= top2 or bottom2 + GAP <= top
    return beside and abs(_middle(a) - _middle(b)) >= 2 * APART
