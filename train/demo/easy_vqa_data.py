"""easy-VQA (github.com/vzhou842/easy-VQA, MIT; the package `easy-vqa`): pictures, questions, answers.

Every picture holds one shape of one colour; there are 107 different questions and 13 answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pgfast.errors import MissingDependencyError

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = ("what color", "what shape", "color present", "color absent", "shape present", "shape absent")
"""What a question asks; a yes/no question also says whether its colour or shape really is in the picture."""
UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Questions:
    """A set of pictures and the questions about them."""

    images: NDArray[np.uint8]
    """[I, 64, 64, 3]"""
    image_index: NDArray[np.int64]
    """[Q], row of `images`."""
    texts: list[str]
    answers: list[str]

    def kinds(self) -> NDArray[np.int64]:
        """[Q], index into `KINDS`."""
        return np.array([KINDS.index(kind_of(q, a)) for q, a in zip(self.texts, self.answers, strict=True)])

    def take(self, keep: NDArray[np.bool_]) -> Questions:
        """Return the questions of the pictures in `keep`, [I] bool."""
        rows = np.flatnonzero(keep[self.image_index])
        renumber = np.cumsum(keep) - 1
        return Questions(
            self.images[keep],
            renumber[self.image_index[rows]],
            [self.texts[row] for row in rows],
            [self.answers[row] for row in rows],
        )


def load(split: Literal["train", "test"]) -> Questions:
    """Read a split of the installed package.

    Raises:
        MissingDependencyError: `easy-vqa` is not installed.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise MissingDependencyError("easy-vqa", "train") from error
    from PIL import Image

    if split == "train":
        paths, (texts, answers, ids) = easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()
    else:
        paths, (texts, answers, ids) = easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()
    order = sorted(paths)
    row_of = {id: row for row, id in enumerate(order)}
    images = np.stack([np.asarray(Image.open(paths[id]).convert("RGB")) for id in order])
    return Questions(images, np.array([row_of[id] for id in ids]), list(texts), list(answers))


def kind_of(question: str, answer: str) -> str:
    """Say what a question asks, for sampling and for reports."""
    if answer not in ("yes", "no"):
        return "what color" if answer in COLORS else "what shape"
    negated = re.search(r"\b(no|not)\b", question) is not None
    present = (answer == "yes") != negated
    subject = "shape" if any(re.search(rf"\b{shape}\b", question) for shape in SHAPES) else "color"
    return f"{subject} {'present' if present else 'absent'}"


def labels(questions: Questions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (shape, color) of each picture, [I] each, as far as its own questions tell; `UNKNOWN` otherwise."""
    shape = np.full(len(questions.images), UNKNOWN)
    color = np.full(len(questions.images), UNKNOWN)
    for row, text, answer in zip(questions.image_index, questions.texts, questions.answers, strict=True):
        told = [answer] if answer not in ("yes", "no") else []
        if kind_of(text, answer).endswith("present") or text.startswith("what"):
            told += re.findall(r"\w+", text)
        for word in told:
            if word in SHAPES:
                shape[row] = SHAPES.index(word)
            elif word in COLORS:
                color[row] = COLORS.index(word)
    return shape, color


def move_shapes(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Flip, rotate by quarter turns and shift each picture's shape to a random place; no answer changes.

    Args:
        images: [N, R, R, 3].
        rng: Source of the choices.
    """
    size = images.shape[1]
    out = np.empty_like(images)
    for row, (image, (top, left, bottom, right)) in enumerate(zip(images, bounding_boxes(images), strict=True)):
        # the background has one colour, so rolling within the shape's room only moves the shape
        down = rng.integers(-top, size - bottom, endpoint=True)
        across = rng.integers(-left, size - right, endpoint=True)
        moved = np.rot90(np.roll(image, (down, across), axis=(0, 1)), int(rng.integers(4)))
        out[row] = moved[:, ::-1] if rng.integers(2) else moved
    return out


def move_easy_vqa(images: NDArray[np.uint8], names: Sequence[str], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Apply `move_shapes` to easy-VQA's pictures, by their names; other pictures stay as they are."""
    ours = np.array([name.startswith("easy-vqa/") for name in names], dtype=bool)
    out = images.copy()
    out[ours] = move_shapes(images[ours], rng)
    return out


def bounding_boxes(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return [N, 4]: top, left, bottom, right (exclusive) of what differs from each picture's main colour."""
    boxes = np.empty((len(images), 4), dtype=np.int64)
    for row, image in enumerate(images):
        packed = image.astype(np.int64) @ [1 << 16, 1 << 8, 1]  # [R, R], one number per colour
        colors, counts = np.unique(packed, return_counts=True)
        differs = packed != colors[counts.argmax()]
        ys, xs = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
        boxes[row] = ys[0], xs[0], ys[-1] + 1, xs[-1] + 1
    return boxes
