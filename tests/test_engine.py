"""The engine on random weights: batches, streaming, sampling, confidence, choices."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import random_pixels
from pgfast.export.verify import TransformersReference
from PIL import Image

import pgfast
from pgfast import GenerateOptions
from pgfast.engine import Engine
from pgfast.errors import ImageError, InputError, PromptError
from pgfast.image import open_image, to_pixel_values
from pgfast.runtime.sampling import log_softmax

QUESTIONS = [
    "what color is the shape?",
    "is there a circle?",
    "what is in the picture",
    "red",
    "is there a green shape in the picture ?",
]


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return pgfast.load(bundle, provider="cpu")


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return ((random_pixels(0, 50)[0].transpose(1, 2, 0) + 1) * 127).astype(np.uint8)


def prompt_ids(engine: Engine, text: str) -> list[int]:
    return engine._encode_prompt(text)


def test_greedy_answer_and_its_confidence_equal_transformers(
    engine: Engine, image: np.ndarray, reference: TransformersReference
) -> None:
    """Confidence is the product of the answer's token probabilities under the full softmax."""
    answer = engine.answer(image, QUESTIONS[0], options=GenerateOptions(max_new_tokens=6))
    pixels = to_pixel_values(open_image(image), engine.manifest.image)
    prompt = prompt_ids(engine, f"answer en {QUESTIONS[0]}")
    product = 1.0
    for position, token in enumerate(answer.token_ids):
        probabilities = np.exp(log_softmax(reference.logits(pixels, prompt, answer.token_ids[:position])))
        assert token == int(probabilities.argmax())
        assert np.exp(answer.token_logprobs[position]) == pytest.approx(probabilities[token], rel=1e-4)
        product *= float(probabilities[token])
    assert answer.confidence == pytest.approx(product, rel=1e-3)
    assert answer.finish_reason == ("stop" if answer.token_ids[-1] == 1 else "length")


@pytest.mark.parametrize(
    "options", [GenerateOptions(max_new_tokens=12), GenerateOptions(max_new_tokens=12, temperature=1.0, seed=7)]
)
def test_a_batch_equals_one_by_one(engine: Engine, image: np.ndarray, options: GenerateOptions) -> None:
    """Also across the cut into batches of 16, and whatever the neighbours are."""
    flipped = np.ascontiguousarray(image[::-1])
    pairs = [(image if i % 2 else flipped, QUESTIONS[i % len(QUESTIONS)]) for i in range(19)]
    together = engine.answer_batch(pairs, options=options)
    for (picture, question), answer in zip(pairs, together, strict=True):
        alone = engine.answer(picture, question, options=options)
        assert answer.token_ids == alone.token_ids
        assert answer.token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-4)


def test_an_empty_batch_is_empty(engine: Engine) -> None:
    assert engine.answer_batch([]) == []


def test_an_encoded_image_gives_the_same_answer_and_costs_no_vision(engine: Engine, image: np.ndarray) -> None:
    encoded = engine.encode_image(image)
    assert (encoded.width, encoded.height) == (50, 50)
    assert encoded.image_features.shape == (1, 16, 48)
    options = GenerateOptions(max_new_tokens=5)
    with_picture, with_features = engine.answer(image, "red", options=options), engine.answer(encoded, "red", options=options)
    assert with_picture.token_ids == with_features.token_ids
    assert with_picture.timings.vision > 0
    assert with_features.timings.vision == 0


def test_an_encoded_image_of_another_bundle_is_refused(engine: Engine, image: np.ndarray, demo: Engine) -> None:
    with pytest.raises(InputError, match="another bundle"):
        engine.answer(demo.encode_image(image), "red")


def test_stream_pieces_add_up_to_the_answer(engine: Engine, image: np.ndarray) -> None:
    for options in (GenerateOptions(max_new_tokens=9), GenerateOptions(max_new_tokens=9, temperature=1.5, seed=1)):
        pieces = list(engine.stream(image, "what is", options=options))
        assert "".join(pieces).strip() == engine.generate(image, "what is", options=options).text


def test_a_stream_that_is_dropped_leaves_the_engine_usable(engine: Engine, image: np.ndarray) -> None:
    stream = engine.stream(image, "what is", options=GenerateOptions(max_new_tokens=20, temperature=1.5, seed=2))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engine.generate(image, "what is", options=GenerateOptions(max_new_tokens=2)).token_ids


def test_questions_may_come_while_a_stream_is_open(engine: Engine, image: np.ndarray) -> None:
    options = GenerateOptions(max_new_tokens=12, temperature=1.5, seed=2)
    wanted = engine.generate(image, "what is", options=options).text
    pieces = []
    for piece in engine.stream(image, "what is", options=options):
        pieces.append(piece)
        engine.answer(image, "red", options=GenerateOptions(max_new_tokens=2))
    assert "".join(pieces).strip() == wanted


def test_stop_texts_end_and_are_cut(engine: Engine, image: np.ndarray) -> None:
    options = GenerateOptions(max_new_tokens=20, temperature=2.0, seed=5)
    whole = engine.generate(image, "what is", options=options).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    stopped = engine.generate(image, "what is", options=GenerateOptions(20, temperature=2.0, seed=5, stop=(stop,)))
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole[: whole.find(stop)].strip()
    streamed = "".join(engine.stream(image, "what is", options=GenerateOptions(20, temperature=2.0, seed=5, stop=(stop,))))
    assert streamed.strip() == stopped.text


def test_the_same_seed_gives_the_same_text_and_another_seed_another(engine: Engine, image: np.ndarray) -> None:
    def ids(seed: int | None) -> tuple[int, ...]:
        return engine.generate(image, "what", options=GenerateOptions(20, temperature=2.0, seed=seed)).token_ids

    assert ids(1) == ids(1)
    assert len({ids(1), ids(2), ids(3), ids(None)}) == 4


def test_choices_are_scored_exactly(engine: Engine, image: np.ndarray, reference: TransformersReference) -> None:
    """Choices of different lengths, one the beginning of another, end token counted."""
    choices = ["red", "red circle", "blue green ?", "no"]
    answer = engine.answer(image, QUESTIONS[0], choices=choices)
    pixels = to_pixel_values(open_image(image), engine.manifest.image)
    prompt = prompt_ids(engine, f"answer en {QUESTIONS[0]}")
    wanted = []
    for choice in choices:
        ids = [*engine._tokenizer.encode_suffix(choice), engine.manifest.tokens.eos]
        logprobs = [log_softmax(reference.logits(pixels, prompt, ids[:i]))[token] for i, token in enumerate(ids)]
        wanted.append(float(np.exp(sum(logprobs))))
    assert answer.choices is not None
    assert list(answer.choices) == choices
    np.testing.assert_allclose(list(answer.choices.values()), np.array(wanted) / sum(wanted), rtol=1e-3)
    assert answer.text == choices[int(np.argmax(wanted))]
    assert answer.confidence == pytest.approx(max(wanted), rel=1e-3)


def test_threads_do_not_disturb_each_other(engine: Engine, image: np.ndarray) -> None:
    options = GenerateOptions(max_new_tokens=8)
    wanted = [engine.answer(image, question, options=options).token_ids for question in QUESTIONS]
    found: dict[int, tuple[int, ...]] = {}

    def ask(i: int) -> None:
        found[i] = engine.answer(image, QUESTIONS[i % len(QUESTIONS)], options=options).token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(10)] == wanted * 2


def test_timings_add_up(engine: Engine, image: np.ndarray) -> None:
    t = engine.answer(image, "red", options=GenerateOptions(max_new_tokens=5)).timings
    assert t.preprocess > 0
    assert 0 < t.prefill < t.ttft
    assert t.preprocess + t.vision + t.prefill + t.decode <= t.total
    assert t.ttft <= t.total


@pytest.mark.parametrize(
    "options",
    [
        GenerateOptions(max_new_tokens=0),
        GenerateOptions(max_new_tokens=10_000),
        GenerateOptions(temperature=-1),
        GenerateOptions(temperature=float("nan")),
        GenerateOptions(top_p=0),
        GenerateOptions(top_k=-1),
        GenerateOptions(stop=("",)),
        GenerateOptions(stop="unless"),  # type: ignore[arg-type]
        GenerateOptions(seed=-1),
        GenerateOptions(max_new_tokens="3"),  # type: ignore[arg-type]
        GenerateOptions(max_new_tokens=2.5),  # type: ignore[arg-type]
        GenerateOptions(top_k=1.5),  # type: ignore[arg-type]
        {"max_new_tokens": 3},
    ],
)
def test_bad_options_are_refused(engine: Engine, image: np.ndarray, options: GenerateOptions) -> None:
    with pytest.raises(InputError):
        engine.answer(image, "red", options=options)


def test_bad_questions_are_refused(engine: Engine, image: np.ndarray) -> None:
    for question in ("", "  ", "is <image> here?", "<loc0001>", "the <eos>", "shape " * 200):
        with pytest.raises((PromptError, InputError)):
            engine.answer(image, question)
    for choices in (["yes", ""], "blue", [1], ["\ud800"], ["<eos>"], ["blue", "Blue"], ["blue " * 300]):
        with pytest.raises(InputError):
            engine.answer(image, "red", choices=choices)  # type: ignore[arg-type]
    for bad in (None, 3, b"red"):
        with pytest.raises(InputError):
            engine.generate(image, bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="language"):
        engine.answer(image, "red", language=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pairs"):
        engine.answer_batch((image, "red"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="choices is empty"):
        engine.answer(image, "red", choices=[])
    with pytest.raises(ImageError):
        engine.stream(Image, "red")


@pytest.mark.parametrize("threads", [0, -1, 10**11, "2"])
def test_threads_must_be_sensible(bundle: Path, threads: int) -> None:
    with pytest.raises(InputError, match="threads"):
        pgfast.load(bundle, threads=threads)


def test_features_of_another_shape_are_refused(engine: Engine, image: np.ndarray) -> None:
    encoded = engine.encode_image(image)
    for features in (encoded.image_features[:, :10], np.repeat(encoded.image_features, 2, axis=0)):
        with pytest.raises(InputError, match="image_features"):
            engine.answer(dataclasses.replace(encoded, image_features=features), "red")
