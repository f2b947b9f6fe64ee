"""`Engine.submit`: asking without waiting, partial text, prepared pictures."""

from __future__ import annotations

import itertools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import Shape, make_bundle, make_checkpoint
from PIL import Image

import pgfast
from pgfast import GenerateOptions
from pgfast.engine import Engine
from pgfast.errors import ImageError, InputError, OverloadedError, PgfastError
from pgfast.types import EncodedImage

QUESTION = "what color is the shape?"


@pytest.fixture(scope="module")
def image(demo: Engine, picture: np.ndarray) -> EncodedImage:
    return demo.encode_image(picture)


def test_the_answer_is_that_of_answer(demo: Engine, image: EncodedImage) -> None:
    finished = threading.Event()
    pending = demo.submit(image, QUESTION, on_progress=finished.set)
    assert finished.wait(20)
    assert pending.done
    wanted, found = demo.answer(image, QUESTION), pending.result(timeout=0)
    assert (found.text, found.token_ids, found.finish_reason) == (wanted.text, wanted.token_ids, "stop")
    assert found.token_logprobs == pytest.approx(wanted.token_logprobs, abs=1e-5)
    assert pending.result() == found  # again: at once
    choices = demo.submit(image, "is there a circle?", choices=["yes", "no"]).result()
    assert choices.choices == pytest.approx(demo.answer(image, "is there a circle?", choices=["yes", "no"]).choices, abs=1e-5)
    raw = demo.submit(image, prompt=f"answer en {QUESTION}").result()
    assert raw.text == wanted.text


def test_waiting_has_an_end_and_the_work_goes_on(demo: Engine, image: EncodedImage) -> None:
    assert demo._model.turns is not None
    with demo._model.turns:  # nothing can run
        pending = demo.submit(image, QUESTION)
        with pytest.raises(TimeoutError, match=r"no answer within 0\.01 seconds"):
            pending.result(timeout=0.01)
        assert not pending.done
        cancelled = demo.submit(image, QUESTION)
        cancelled.cancel()
    assert pending.result(timeout=20).text == "blue"
    with pytest.raises(PgfastError, match="cancelled"):
        cancelled.result(timeout=20)


def test_partial_text_only_grows_and_every_token_is_news(demo: Engine, image: EncodedImage) -> None:
    seen: list[str] = []
    options = GenerateOptions(max_new_tokens=4)
    holder: list[pgfast.pending.Pending] = []  # type: ignore[name-defined]
    started, finished = threading.Event(), threading.Event()

    def look() -> None:
        assert started.wait(20)
        seen.append(holder[0].text())
        if holder[0].done:
            finished.set()

    holder.append(demo.submit(image, QUESTION, options=options, streaming=True, on_progress=look))
    started.set()
    assert finished.wait(20)
    answer = holder[0].result()
    assert len(seen) == len(answer.token_ids)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
    assert seen[-1].strip() == answer.text
    assert "".join(demo.submit(image, QUESTION, options=options, streaming=True).pieces()).strip() == answer.text


def test_a_failing_callback_is_logged_and_hurts_nobody(
    demo: Engine, image: EncodedImage, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("the loop is closed")

    with caplog.at_level(logging.ERROR):
        assert demo.submit(image, QUESTION, on_progress=fail).result(20).text == "blue"
        assert demo.answer(image, QUESTION).text == "blue"
    assert "on_progress failed" in caplog.text


def test_what_cannot_be_asked_is_refused_at_once(demo: Engine, image: EncodedImage) -> None:
    with pytest.raises(InputError, match="a question or a raw prompt"):
        demo.submit(image, QUESTION, prompt="caption en")
    with pytest.raises(InputError, match="the question is empty"):
        demo.submit(image)
    demo.max_waiting = 0
    try:
        with pytest.raises(OverloadedError):
            demo.submit(image, QUESTION)
    finally:
        demo.max_waiting = None


def test_a_prepared_picture_is_the_picture(demo: Engine, picture: np.ndarray, tmp_path: Path) -> None:
    prepared = demo.prepare_image(picture)
    assert (prepared.width, prepared.height, prepared.pixels.shape) == (96, 96, (64, 64, 3))
    assert demo.prepare_image(prepared) is prepared
    for answer in (demo.answer(prepared, QUESTION), *demo.answer_batch([(prepared, QUESTION), (picture, QUESTION)])):
        assert answer.token_logprobs == pytest.approx(demo.answer(picture, QUESTION).token_logprobs, abs=1e-5)
    with pytest.raises(ImageError, match="96 x 96 pixels: at most 9,000 are accepted"):
        demo.prepare_image(picture, max_pixels=9000)
    Image.new("L", (10_000, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(ImageError, match="at most 80,000,000"):
        demo.prepare_image(tmp_path / "large.png", max_pixels=10**12)
    other = make_bundle(make_checkpoint(tmp_path / "c", Shape()), tmp_path / "b")
    with pgfast.load(other) as engine, pytest.raises(InputError, match="prepare the picture again"):
        engine.answer(prepared, "what color")


def test_many_threads_get_what_one_gets(demo: Engine) -> None:
    pictures = [np.full((40, 40, 3), 255, np.uint8) for _ in range(24)]
    for i, each in enumerate(pictures):
        each[10:30, 10:30] = (255 * (i % 3 == 0), 255 * (i % 3 == 1), 255 * (i % 3 == 2))
    runs: list[int] = []
    demo.on_step = runs.append
    try:
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda each: demo.submit(each, QUESTION).result(20), pictures))
    finally:
        demo.on_step = None
    for answer, each in zip(found, pictures, strict=True):
        alone = demo.answer(each, QUESTION)
        assert answer.token_ids == alone.token_ids
        assert answer.token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-4)
    assert max(runs) <= 16
    assert demo.load_figures().slots == 16
    assert (demo.load_figures().waiting, demo.load_figures().running) == (0, 0)
