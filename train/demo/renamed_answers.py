"""A shifted task for the demo model: easy-VQA with every colour and shape called by another's name.

The pictures and questions stay, and so do yes and no; a model that knows easy-VQA gets every "what" question wrong, and has
to learn the new names without losing the rest. `python -m pgfast.train.demo.renamed_answers OUT` writes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

from .easy_vqa_data import COLORS, SHAPES, Questions, load

NEW_NAME = {
    **dict(zip(COLORS, COLORS[3:] + COLORS[:3], strict=True)),
    **dict(zip(SHAPES, SHAPES[1:] + SHAPES[:1], strict=True)),
}
"""Old to new: black is called gray, a circle rectangle, and so on."""


def write(out: Path, *, train_pictures: int = 500, test_pictures: int = 200) -> None:
    """Write `OUT/{train,test}/annotations.jsonl` with their pictures, from the splits of the same names.

    Args:
        out: A new folder.
        train_pictures: The first ones of the training split, about ten questions each.
        test_pictures: The first ones of the test split.
    """
    for split, count in (("train", train_pictures), ("test", test_pictures)):
        folder = out / split
        folder.mkdir(parents=True)
        questions: Questions = load("train" if split == "train" else "test")
        for number in range(count):
            Image.fromarray(questions.images[number]).save(folder / f"{number}.png")
        rows = zip(questions.image_index.tolist(), questions.texts, questions.answers, strict=True)
        with (folder / "annotations.jsonl").open("w") as file:
            for number, text, answer in rows:
                if number < count:
                    row = {"image": f"{number}.png", "question": text, "answer": NEW_NAME.get(answer, answer)}
                    row["answer_type"] = "yes/no" if answer in ("yes", "no") else "renamed"
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
