"""The engine's questions together: joining, streams, threads, memory, closing; on random weights in both dialects."""

from __future__ import annotations

import dataclasses
import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_pixels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pgfast.export.verify import TransformersReference

import pgfast
from pgfast import GenerateOptions
from pgfast.engine import ENCODED_AHEAD, Engine
from pgfast.errors import ImageError, InputError, OverloadedError, PgfastError
from pgfast.image import open_image, to_pixel_values
from pgfast.pictures import RECENT

WORDS = ["what", "color", "is", "the", "shape", "red", "blue", "green", "circle", "there", "a", "picture"]


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[Engine]:
    with pgfast.load(bundle, provider="cpu") as engine:
        yield engine


def picture(seed: int) -> np.ndarray:
    return ((random_pixels(seed, 40)[0].transpose(1, 2, 0) + 1) * 127).astype(np.uint8)


question_strategy = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join)
options_strategy = st.builds(
    GenerateOptions,
    max_new_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.0, 1.5]),
    seed=st.integers(0, 3),
    stop=st.sampled_from([(), ("e",)]),
)
choices_strategy = st.lists(question_strategy, min_size=1, max_size=4, unique=True)
requests_strategy = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.integers(0, 3),
        question_strategy,
        st.one_of(options_strategy, choices_strategy),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=requests_strategy)
def test_any_mix_joining_at_any_step_equals_one_by_one(
    requests: list[Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question is asked when the decoder begins a certain run, from a thread of its own."""
    images = [engine.encode_image(picture(seed)) for seed in range(4)]

    def ask(request: Any) -> pgfast.Answer:
        _, seed, text, what = request
        if isinstance(what, GenerateOptions):
            return engine.answer(images[seed], text, options=what)
        return engine.answer(images[seed], text, choices=what)

    alone = [ask(request) for request in requests]
    found: dict[int, pgfast.Answer] = {}
    left = sorted(range(len(requests)), key=lambda i: requests[i][0])
    threads: list[threading.Thread] = []
    runs, joining, run = 0, threading.Lock(), engine._model.decoder._run

    def join() -> None:
        with joining:
            while left and requests[left[0]][0] <= runs:
                i = left.pop(0)
                threads.append(threading.Thread(target=lambda i=i: found.update({i: ask(requests[i])})))
                threads[-1].start()

    def counting(*args: Any) -> None:
        nonlocal runs
        join()
        runs += 1
        run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine._model.decoder, "_run", counting)
        while left or any(thread.is_alive() for thread in threads):
            if not any(thread.is_alive() for thread in threads):
                runs = requests[left[0]][0]
                join()
            for thread in threads:
                thread.join()
    for i, wanted in enumerate(alone):
        assert found[i].token_ids == wanted.token_ids
        assert found[i].text == wanted.text
        assert found[i].token_logprobs == pytest.approx(wanted.token_logprobs, abs=1e-4)
        if wanted.choices is not None:
            assert found[i].choices == pytest.approx(wanted.choices, abs=1e-4)


def test_a_full_batch_equals_transformers(engine: Engine, reference: TransformersReference) -> None:
    questions = [(picture(i), " ".join(WORDS[: 1 + i % 7])) for i in range(20)]
    answers = engine.answer_batch(questions, options=GenerateOptions(max_new_tokens=4))
    for (image, question), answer in list(zip(questions, answers, strict=True))[::4]:
        pixels = to_pixel_values(open_image(image), engine.manifest.image)
        prompt = engine._encode_prompt(f"answer en {question}")
        for position, token in enumerate(answer.token_ids):
            assert token == int(reference.logits(pixels, prompt, answer.token_ids[:position]).argmax())


def test_many_threads_ask_at_once_and_share_steps(engine: Engine) -> None:
    questions = [" ".join(WORDS[: 1 + i % 9]) for i in range(40)]
    image, options = engine.encode_image(picture(0)), GenerateOptions(max_new_tokens=10)
    wanted = [engine.answer(image, question, options=options).token_ids for question in questions]
    steps, step = 0, engine._model.decoder.step

    def counting(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        time.sleep(0.002)  # let the others come
        return step(*args)

    found: dict[int, tuple[int, ...]] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: engine.answer(image, questions[i], options=options).token_ids}))
        for i in range(40)
    ]
    engine._model.decoder.step = counting  # type: ignore[method-assign]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        del engine._model.decoder.step
    assert [found[i] for i in range(40)] == wanted
    assert steps < sum(len(ids) - 1 for ids in wanted) * 0.7


def test_a_long_batch_holds_few_encoded_pictures(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, alive, most = engine._model.encode, weakref.WeakSet[Any](), 0

    class Features(np.ndarray):
        """So that sets of weak references take it."""

        __hash__ = object.__hash__

    def counting(pixels: np.ndarray) -> np.ndarray:
        nonlocal most
        features = encode(pixels).view(Features)
        alive.add(features)
        most = max(most, sum(len(each) for each in list(alive)))
        return features

    monkeypatch.setattr(engine._model, "encode", counting)
    answers = engine.answer_batch([(picture(i), "red") for i in range(120)], options=GenerateOptions(max_new_tokens=3))
    assert len(answers) == 120
    together = engine._model.together
    # ahead, recent, and at both ends of each a group that is there only in part
    assert most <= ENCODED_AHEAD + RECENT + 4 * together


def test_a_picture_that_comes_again_soon_is_encoded_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, encoded = engine._model.encode, []
    monkeypatch.setattr(engine._model, "encode", lambda pixels: (encoded.append(len(pixels)), encode(pixels))[1])
    images = [picture(i) for i in range(3)]
    answers = engine.answer_batch([(images[i % 3], WORDS[i]) for i in range(10)], options=GenerateOptions(max_new_tokens=2))
    assert sum(encoded) == 3
    assert [answer.timings.vision > 0 for answer in answers][::9] == [True, False]
    for i in (0, 4, 9):
        assert (
            answers[i].token_ids == engine.answer(images[i % 3], WORDS[i], options=GenerateOptions(max_new_tokens=2)).token_ids
        )


def test_a_bad_picture_in_a_batch_takes_the_others_back(engine: Engine) -> None:
    with pytest.raises(ImageError):
        engine.answer_batch([(picture(i), "red") for i in range(30)] + [("/nonexistent.png", "red")])
    assert not engine._scheduler._waiting
    assert engine.answer(picture(0), "red").token_ids
    assert not engine._scheduler._running


def test_a_dropped_stream_frees_its_slot(engine: Engine) -> None:
    options = GenerateOptions(max_new_tokens=30, temperature=1.5, seed=2)
    for _ in range(40):  # more than there are slots
        stream = engine.stream(picture(0), "what", options=options)
        next(stream)
        del stream
    engine.answer(picture(0), "red")
    assert not engine._scheduler._running


def test_waiting_can_be_limited(bundle: Path) -> None:
    with pgfast.load(bundle, provider="cpu") as engine:
        assert engine.max_waiting is None
        engine.max_waiting = 0
        with pytest.raises(OverloadedError):
            engine.answer(picture(0), "red")
        engine.max_waiting = None
        assert engine.answer(picture(0), "red").token_ids


def test_a_batch_does_not_refuse_itself(bundle: Path) -> None:
    with pgfast.load(bundle, provider="cpu") as engine:
        questions: list[Any] = [(picture(seed), "red") for seed in range(30)]
        wanted = engine.answer_batch(questions)
        engine.max_waiting = 1
        assert [answer.token_ids for answer in engine.answer_batch(questions)] == [answer.token_ids for answer in wanted]


def test_features_that_are_no_numbers_are_refused_before_they_meet_others(engine: Engine) -> None:
    image = engine.encode_image(picture(0))
    words = dataclasses.replace(image, image_features=np.full(image.image_features.shape, "x"))
    with pytest.raises(InputError, match="image_features"):
        engine.answer(words, "red")


def test_a_failing_run_leaves_the_engine_usable(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run fails inside ONNX Runtime: ids beyond the vocabulary."""
    image, options = engine.encode_image(picture(0)), GenerateOptions(max_new_tokens=8)
    wanted = engine.answer(image, "red", options=options)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_encode_prompt", lambda prompt: [2, 10**6, 4])
        with pytest.raises(PgfastError, match="the decoder fails"):
            engine.answer(image, "red", options=options)
    assert engine.answer(image, "red", options=options).token_ids == wanted.token_ids


def test_a_closed_engine_refuses(bundle: Path) -> None:
    engine = pgfast.load(bundle, provider="cpu")
    engine.answer(picture(0), "red")
    thread = engine._scheduler._thread
    assert thread is not None
    engine.close()
    assert not thread.is_alive()
    with pytest.raises(PgfastError, match="closed: load the bundle again"):
        engine.answer(picture(0), "red")
    engine.close()


def test_an_engine_that_is_dropped_ends_its_thread(bundle: Path) -> None:
    engine = pgfast.load(bundle, provider="cpu")
    engine.answer(picture(0), "red", options=GenerateOptions(max_new_tokens=3, stop=("e",)))
    thread, alive = engine._scheduler._thread, weakref.ref(engine)
    assert thread is not None
    del engine
    gc.collect()
    assert alive() is None
    thread.join(timeout=10)
    assert not thread.is_alive()


ENDLESS = """
import sys, time
import numpy as np
import pgfast
engine = pgfast.load(provider="cpu")
image = engine.encode_image(np.zeros((96, 96, 3), np.uint8))
run = engine._model.decoder._run
def slow(*args):
    time.sleep(0.05)
    run(*args)
engine._model.decoder._run = slow
options = pgfast.GenerateOptions(temperature=100.0, seed=1)
"""


def test_the_interpreter_ends_while_a_stream_is_open() -> None:
    code = ENDLESS + "stream = engine.stream(image, 'what', options=options)\nnext(stream)\nprint('ending')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ending\n", "")


def test_control_c_ends_a_waiting_call() -> None:
    code = ENDLESS + (
        "print('asking', flush=True)\n"
        "try:\n    engine.answer_batch([(image, 'what')] * 10_000, options=options)\n"
        "except KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
        "engine._model.decoder._run = run\n"
        "print(len(engine.answer(image, 'what').token_ids) > 0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "asking\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "interrupted\nTrue\n", "")
