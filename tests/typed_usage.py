"""Calls to the public API that mypy checks strictly; never executed."""

from __future__ import annotations

from pathlib import Path

import pgfast


def usage(engine: pgfast.Engine) -> float:
    other: pgfast.Engine = pgfast.load(Path("bundle"), provider="cpu", threads=2)
    encoded: pgfast.EncodedImage = other.encode_image("picture.jpg")
    options = pgfast.GenerateOptions(max_new_tokens=4, temperature=0.5, seed=1, stop=(".",))
    answers: list[pgfast.Answer] = engine.answer_batch([(encoded, "what?"), (b"bytes", "who?")], options=options)
    pieces: list[str] = list(engine.stream(encoded, "caption en"))
    answer: pgfast.Answer = engine.answer("picture.jpg", "is it red?", choices=["yes", "no"], language="en")
    timings: pgfast.Timings = answer.timings
    edges: list[tuple[float, float, float, float]] = [found.box for found in engine.detect(encoded, ["cat", "dog"])]
    problems: tuple[str, ...] = engine.detect("picture.jpg", "cat ; dog", options=options).problems
    shares: dict[str, float] | None = answer.choices
    return (
        timings.total
        + len(pieces)
        + len(answers)
        + len(edges)
        + len(problems)
        + (shares or {}).get("yes", 0.0)
        + answer.confidence
    )
