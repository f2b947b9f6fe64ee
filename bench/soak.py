"""Memory over many answers: `python -m pgfast.bench.soak --answers 20000`; the report is JSON.

Several threads ask one engine in all of its ways, with pictures of many sizes and kinds, and bad ones in between. The resident
memory is sampled as it goes; after the first quarter, when all is warm, it should not grow.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pgfast
from pgfast import Engine, GenerateOptions
from pgfast.errors import InputError

from .machine import describe
from .reliability import MOST_SLOPE, write_part

THREADS = 4
SAMPLES = 200
COLORS = ("red", "green", "blue", "yellow", "black", "gray", "teal", "brown")
WORDS = ("what", "color", "shape", "is", "the", "in", "a", "there", "circle", "rectangle", "triangle", "?", *COLORS)
QUESTION, ANSWER = "what color is the shape?", "blue"
KINDS = ("answer", "choices", "stream", "left stream", "batch", "sampled", "caption", "asked twice", "refused", "known")
"""Ways to ask, in turn; `known` has an answer that is compared."""


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def usage() -> tuple[int, int]:
    """Threads and open files."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def picture(rng: random.Random) -> Any:
    """Return an array or the bytes of a file, of many sizes."""
    from PIL import Image

    height, width = rng.choice((1, 7, 40, 64, 200, 480)), rng.choice((1, 16, 64, 90, 640))
    array = np.full((height, width, 3), [rng.randrange(256) for _ in range(3)], np.uint8)
    array[height // 4 : height // 2, width // 4 : width // 2] = rng.randrange(256)
    kind = rng.choice(("array", "PNG", "JPEG", "WEBP", "GIF", "BMP", "image"))
    if kind == "array":
        return array
    image = Image.fromarray(array)
    if kind == "image":
        return image
    file = io.BytesIO()
    (image.convert("RGBA") if kind == "PNG" and height % 2 else image).save(file, kind)
    return file.getvalue()


def blue_square() -> NDArray[np.uint8]:
    """Return a picture whose answer is known."""
    array = np.full((96, 96, 3), 255, np.uint8)
    array[30:66, 30:66] = (0, 0, 255)
    return array


class Soak:
    """Asks until there are enough answers.

    Args:
        engine: The demo model's.
        answers: How many.
        seed: Of pictures and questions.
    """

    def __init__(self, engine: Engine, answers: int, seed: int = 0) -> None:
        self._engine, self._answers, self._seed = engine, answers, seed
        self._lock = threading.Lock()
        self.kinds: Counter[str] = Counter()
        self.samples: list[tuple[int, int]] = []
        """Answers so far, and resident bytes."""
        self.wrong = 0
        self._after_warm_up: tuple[int, int] | None = None
        self._failure: BaseException | None = None

    def run(self) -> dict[str, Any]:
        """Return the report."""
        start = time.perf_counter()
        threads = [threading.Thread(target=self._work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        warm = [sample for sample in self.samples if sample[0] >= self._answers / 4]
        slope = float(np.polyfit([count for count, _ in warm], [size for _, size in warm], 1)[0])
        assert self._after_warm_up is not None
        now = usage()
        return {
            "answers": sum(self.kinds.values()),
            "kinds": dict(sorted(self.kinds.items())),
            "threads": THREADS,
            "seconds": time.perf_counter() - start,
            "wrong": self.wrong,
            "slope": slope,
            "first": warm[0][1],
            "last": warm[-1][1],
            "peak": max(size for _, size in self.samples),
            # those that ask have ended at the end
            "more_threads": now[0] - (self._after_warm_up[0] - THREADS),
            "more_files": now[1] - self._after_warm_up[1],
            "samples": self.samples,
        }

    def _work(self, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        try:
            for kind in itertools.cycle(KINDS):
                count = self._ask(kind, rng)
                if self._note(kind, count):
                    return
        except BaseException as error:  # noqa: BLE001 - raised again where `run` was called
            self._failure = error

    def _note(self, kind: str, count: int) -> bool:
        """Count answers, and take a sample when it is time; returns whether there are enough."""
        with self._lock:
            self.kinds[kind] += count
            done = sum(self.kinds.values())
            if done >= len(self.samples) * self._answers / SAMPLES:
                self.samples.append((done, resident()))
            if self._after_warm_up is None and done >= self._answers / 4:
                self._after_warm_up = usage()
            return done >= self._answers or self._failure is not None

    def _ask(self, kind: str, rng: random.Random) -> int:
        """Ask in one way; returns the number of answers."""
        engine, options = self._engine, GenerateOptions(max_new_tokens=rng.randrange(1, 9))
        question = " ".join(rng.choices(WORDS, k=rng.randrange(1, 12)))
        ways: dict[str, Callable[[], Any]] = {
            "answer": lambda: engine.answer(picture(rng), question, options=options),
            "choices": lambda: engine.answer(picture(rng), question, choices=rng.sample(COLORS, rng.randrange(1, 6))),
            "stream": lambda: list(engine.stream(picture(rng), f"answer en {question}", options=options)),
            "left stream": lambda: next(engine.stream(picture(rng), f"answer en {question}", options=options), None),
            "sampled": lambda: engine.generate(
                picture(rng), question, options=GenerateOptions(5, temperature=1.0, seed=rng.randrange(9))
            ),
            "caption": lambda: engine.caption(picture(rng), options=options),
            "refused": lambda: self._refused(rng, question),
            "known": lambda: self._known(),
        }
        if kind == "batch":
            return len(engine.answer_batch([(picture(rng), question) for _ in range(rng.randrange(1, 8))], options=options))
        if kind == "asked twice":
            encoded = engine.encode_image(picture(rng))
            return len([engine.answer(encoded, text, options=options) for text in (question, QUESTION)])
        ways[kind]()
        return 1

    def _refused(self, rng: random.Random, question: str) -> None:
        bad = rng.choice((b"", b"\x89PNG\r\n\x1a\n" + rng.randbytes(40), np.zeros((0, 3, 3), np.uint8), "/nonexistent.png"))
        with contextlib.suppress(InputError):
            self._engine.answer(bad, question)
            self.wrong += 1

    def _known(self) -> None:
        if self._engine.answer(blue_square(), QUESTION).text != ANSWER:
            self.wrong += 1


def main() -> int:
    """Run what the command line says; 1: memory grows, or an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="result file, to which the part 'soak' is written")
    words = parser.parse_args()
    logging.getLogger("pgfast").setLevel(logging.ERROR)  # words that the model does not have, among others
    machine = describe()
    with pgfast.load(provider="cpu") as engine:
        report = Soak(engine, words.answers, words.seed).run()
    if words.json:
        write_part(words.json, "soak", report, machine)
    sys.stdout.write(json.dumps({key: value for key, value in report.items() if key != "samples"}, indent=1) + "\n")
    return int(report["slope"] > MOST_SLOPE or report["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
