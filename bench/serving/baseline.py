"""`Engine.answer_batch` in a process of its own, on the questions that the server gets: `python -m ...baseline MODEL`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from pgfast.errors import PgfastError

from ..worker import be_expendable
from .questions import picture, question


@dataclass(frozen=True, slots=True)
class Batch:
    """One call of `answer_batch`."""

    seconds: float
    cpu: float
    """Seconds of processor time."""
    texts: list[str]


class Baseline:
    """The started process; use it as a context manager.

    Args:
        model: Bundle folder; None: the demo model.
        seed: Of the pictures.
    """

    def __init__(self, model: str | None, seed: int) -> None:
        self._seed = seed
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, model or ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Baseline:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()

    def answer(self, first: int, count: int) -> Batch:
        """Answer questions `first` to `first + count - 1` about their pictures in one call.

        Raises:
            PgfastError: The process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([self._seed, first, count]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise PgfastError("the process that runs answer_batch ended; its message is above")
        return Batch(**json.loads(line))


def main() -> None:
    """Answer until stdin ends; whatever libraries print goes to stderr."""
    be_expendable()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from pgfast.loading import load

    engine = load(sys.argv[1] or None)
    for line in sys.stdin:
        seed, first, count = json.loads(line)
        pairs: list[tuple[Any, str]] = [(picture(seed, number), question(number)) for number in range(first, first + count)]
        start, cpu = time.perf_counter(), time.process_time()
        answers = engine.answer_batch(pairs)
        reply = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "texts": [a.text for a in answers]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
