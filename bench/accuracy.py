"""Accuracy of bundles on the easy-VQA test split: what a precision costs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pgfast
from pgfast.errors import MissingDependencyError


def measure(bundle: str | None) -> dict[str, Any]:
    """Answer all 9,673 questions.

    Args:
        bundle: Bundle folder; None: the embedded one.

    Returns:
        Names, the bundle's `digest`, megabytes, `accuracy` (0 to 1), `wrong` of `count`, `mean_confidence`, `seconds`.
    """
    try:
        from pgfast.train.demo import easy_vqa_data
    except ImportError as error:
        raise MissingDependencyError(error.name or "easy-vqa", "train") from error
    questions = easy_vqa_data.load("test")
    engine = pgfast.load(bundle)
    start = time.perf_counter()
    encoded = [engine.encode_image(image) for image in questions.images]
    pairs: list[Any] = [(encoded[i], text) for i, text in zip(questions.image_index, questions.texts, strict=True)]
    answers = engine.answer_batch(pairs, options=pgfast.GenerateOptions(max_new_tokens=4))
    right = sum(answer.text == wanted for answer, wanted in zip(answers, questions.answers, strict=True))
    m = engine.manifest
    return {
        "bundle": Path(bundle).name if bundle else "embedded",
        "digest": m.digest(),
        "precision": m.precision,
        "vision_precision": m.vision_precision,
        "megabytes": round(sum(entry.size for entry in m.files.values()) / 1e6, 2),
        "accuracy": right / len(answers),
        "count": len(answers),
        "wrong": len(answers) - right,
        "mean_confidence": sum(answer.confidence for answer in answers) / len(answers),
        "seconds": round(time.perf_counter() - start, 1),
    }
