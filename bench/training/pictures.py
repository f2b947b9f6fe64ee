"""Data to train on: photo-sized JPEG files with five questions each, as VQAv2 has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = (640, 480)
"""Of most COCO pictures."""
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 60, 200),
    "yellow": (220, 200, 40),
    "grey": (120, 120, 120),
}


def make_data(folder: Path, pictures: int, seed: int = 0) -> Path:
    """Draw pictures and write `rows.jsonl` beside them.

    Args:
        folder: To create; a folder that is there is kept as it is.
        pictures: How many.
        seed: Decides them.

    Returns:
        The JSONL file, five rows per picture.
    """
    if folder.exists():
        return folder / "rows.jsonl"
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(pictures):
        name, colour, shape = f"{number:05d}.jpg", str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        _draw(rng, colour, shape).save(partial / name, quality=90)
        for question, answer in _questions(rng, colour, shape):
            lines.append(json.dumps({"image": name, "question": question, "answer": answer}))
    (partial / "rows.jsonl").write_text("\n".join(lines) + "\n")
    partial.rename(folder)
    return folder / "rows.jsonl"


def read_rows(data: Path) -> list[dict[str, str]]:
    """Return the rows of `make_data`; `image` is relative to the file's folder."""
    return [json.loads(line) for line in data.read_text().splitlines()]


def words(data: Path) -> list[str]:
    """Return all texts that a tokenizer must know, the prompt's words included."""
    return ["answer", *(f"{row['question']} {row['answer']}" for row in read_rows(data))]


def _draw(rng: np.random.Generator, colour: str, shape: str) -> Image.Image:
    """A soft coloured background with grain, so that it compresses like a photo, and one shape."""
    coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    soft = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(8))
    grain = rng.normal(0, 8, (SIZE[1], SIZE[0], 1))
    picture = Image.fromarray(np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8))
    x, y, r = int(rng.integers(120, 520)), int(rng.integers(120, 360)), int(rng.integers(40, 110))
    draw, fill = ImageDraw.Draw(picture), COLOURS[colour]
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "rectangle":
        draw.rectangle((x - r, y - r // 2, x + r, y + r // 2), fill=fill)
    else:
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    return picture


def _questions(rng: np.random.Generator, colour: str, shape: str) -> list[tuple[str, str]]:
    """Prompts of 6 to 14 tokens and answers of 1 to 4, the range of VQAv2."""
    other = str(rng.choice(SHAPES))
    return [
        ("what shape is this?", shape),
        (f"what is the colour of the {shape} that can be seen in the picture?", colour),
        (f"is there a {other}?", "yes" if other == shape else "no"),
        ("what is in front of the background?", f"a {colour} {shape}"),
        ("how many shapes are there in all?", "one"),
    ]
