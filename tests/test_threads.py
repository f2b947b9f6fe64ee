"""Eight threads on one engine, each asking in every way about its own pictures: all get what one alone gets."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import pgfast
from pgfast import Engine, GenerateOptions, PgfastError

THREADS = 8
QUESTIONS = ("what color is the shape?", "what shape is it?", "is there a circle?")


def picture(number: int) -> np.ndarray:
    """A shape in a colour of its own."""
    rng = random.Random(number)
    array = np.full((60 + number, 90 - number, 3), 255, np.uint8)
    y, x = np.mgrid[: array.shape[0], : array.shape[1]]
    inside = (y - 30) ** 2 + (x - 35) ** 2 < 300 if number % 2 else (abs(y - 30) < 16) & (abs(x - 35) < 16)
    array[inside] = rng.choice([(0, 0, 255), (255, 0, 0), (0, 128, 0), (0, 0, 0)])
    return array


def ways(engine: Engine, number: int) -> list[Callable[[], Any]]:
    """Everything that a thread does; each returns something to compare."""
    image, question = picture(number), QUESTIONS[number % 3]
    sampled = GenerateOptions(max_new_tokens=6, temperature=1.3, seed=number)
    prompt = f"answer en {question}"

    def said(answer: pgfast.Answer) -> tuple[Any, ...]:
        return answer.text, answer.token_ids, answer.token_logprobs

    return [
        lambda: said(engine.answer(image, question)),
        lambda: said(engine.generate(image, prompt, options=sampled)),
        lambda: "".join(engine.stream(image, prompt)),
        lambda: "".join(engine.stream(image, prompt, options=sampled)),
        lambda: tuple((engine.answer(image, question, choices=["red", "blue", "no", "circle"]).choices or {}).values()),
        lambda: [said(answer) for answer in engine.answer_batch([(image, each) for each in QUESTIONS])],
        lambda: said(engine.answer(engine.encode_image(image), question)),
        lambda: said(engine.submit(image, question).result(30)),
        lambda: next(engine.stream(image, prompt), ""),  # left at once
    ]


def same(found: Any, wanted: Any) -> bool:
    """Equal; but arithmetic in a batch of another size differs in the last digits."""
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return bool(found == (pytest.approx(wanted, abs=1e-4) if isinstance(wanted, float) else wanted))


def refused(engine: Engine) -> str:
    with pytest.raises(PgfastError) as caught:
        engine.answer(b"no picture", QUESTIONS[0])
    return str(caught.value)


def test_eight_threads_get_what_one_gets(demo: Engine) -> None:
    wanted = [[way() for way in ways(demo, number)] for number in range(THREADS)]
    assert len({str(each[0]) for each in wanted}) > 1
    message, together = refused(demo), threading.Barrier(THREADS)

    def work(number: int) -> None:
        rng = random.Random(number)
        todo = [*enumerate(ways(demo, number))] * 4
        rng.shuffle(todo)
        together.wait(timeout=20)
        for which, way in todo:
            assert same(way(), wanted[number][which]), (number, which)
            if rng.random() < 0.2:
                assert refused(demo) == message

    runs: list[int] = []
    demo.on_step = runs.append
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(work, number) for number in range(THREADS)]:
                done.result(timeout=120)
    finally:
        demo.on_step = None
    assert max(runs) >= 4  # they did meet
    for _ in range(1000):  # a stream that was left frees its slot at the next step
        if not (demo.load_figures().waiting or demo.load_figures().running):
            break
        time.sleep(0.01)
    assert (demo.load_figures().waiting, demo.load_figures().running) == (0, 0)


def test_engines_may_be_loaded_and_closed_while_others_answer(demo: Engine) -> None:
    wanted = demo.answer(picture(1), QUESTIONS[0]).text
    ending = threading.Event()

    def ask() -> int:
        count = 0
        while not ending.is_set():
            assert demo.answer(picture(1), QUESTIONS[0]).text == wanted
            count += 1
        return count

    def load() -> None:
        for _ in range(5):
            with pgfast.load(provider="cpu", threads=1) as engine:
                assert engine.answer(picture(1), QUESTIONS[0]).text == wanted

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        try:
            for done in [pool.submit(load) for _ in range(2)]:
                done.result(timeout=60)
        finally:
            ending.set()
        assert all(done.result(timeout=20) for done in asking)
