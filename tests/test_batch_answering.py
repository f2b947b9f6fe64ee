"""Rows answered by an engine: the answers of one question at a time, in order, with nothing left behind."""

from __future__ import annotations

import base64
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pgfast
from pgfast import Engine, GenerateOptions
from pgfast.batch import answering
from pgfast.batch.answering import answer_rows
from pgfast.batch.rows import Defaults, Row, failed, to_row
from pgfast.errors import InputError, ProviderError

QUESTIONS = ("what color is the shape?", "is there a circle?", "what shape is present?", "is there a red shape?")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with pgfast.load(provider="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Forty pictures of random rectangles, so that answers and confidences differ."""
    folder, rng, paths = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for number in range(40):
        pixels = np.full((80, 64, 3), rng.integers(0, 256, 3), np.uint8)
        top, left = rng.integers(5, 40, 2)
        pixels[top : top + 30, left : left + 20] = rng.integers(0, 256, 3)
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def rows_about(pictures: list[str], count: int) -> list[Row]:
    """All ways of asking, two rows per picture, with bad rows in between."""
    rows = []
    for number in range(count):
        path = pictures[number // 2 % len(pictures)]
        fields: dict[str, Any] = {"image": path, "question": QUESTIONS[number % 4], "id": number}
        if number % 5 == 1:
            fields["image"] = base64.b64encode(Path(path).read_bytes()).decode()
        if number % 7 == 2:
            fields["choices"] = ["red", "blue", "yes", "circle"]
        if number % 7 == 3:
            fields["prompt"] = f"answer en {fields.pop('question')}"
        if number % 11 == 5:
            fields["image"] = "nowhere.png"
        if number % 11 == 6:
            fields["question"] = " "
            fields.pop("prompt", None)
        if number % 11 == 7:
            fields["language"] = 5
        rows.append(to_row(number, fields, "", Defaults()))
    return rows


def alone(engine: Engine, row: Row) -> Any:
    """The answer, or the error, of a row by itself."""
    picture: Any = base64.b64decode(row.picture) if row.embedded else row.picture
    try:
        if row.prompt is not None:
            return engine.generate(picture, row.prompt)
        assert row.question is not None
        return engine.answer(picture, row.question, choices=row.choices, language=row.language)
    except InputError as error:
        return str(error)


def left_behind() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in ("pgfast-decode", "pgfast-feed")]


def test_every_row_has_the_answer_it_gets_alone(engine: Engine, pictures: list[str]) -> None:
    rows = rows_about(pictures, 120)
    results = list(answer_rows(engine, rows))
    assert [result.row.number for result in results] == list(range(120))
    codes = set()
    for row, result in zip(rows, results, strict=True):
        if result.error is not None:
            assert result.answer is None
            codes.add(result.error.code)
            assert row.error == result.error or result.error.message == alone(engine, row)
            continue
        answer, expected = result.answer, alone(engine, row)
        assert answer is not None
        assert (answer.text, answer.token_ids, answer.finish_reason) == (
            *(expected.text, expected.token_ids, expected.finish_reason),
        )
        assert answer.confidence == pytest.approx(expected.confidence, rel=1e-4)
        assert (answer.choices is None) == (row.choices is None)
        assert dataclasses.replace(result.row, picture="") == dataclasses.replace(row, picture="")
        assert answer.timings.total > 0
    assert codes == {"image_error", "prompt_error", "row_error"}
    assert len({result.answer.text for result in results if result.answer}) > 4
    assert left_behind() == []


def test_a_picture_of_neighbouring_rows_is_decoded_and_encoded_once(
    engine: Engine, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, encoded = [], []
    prepare, encode = engine.prepare_image, engine.encode_images
    monkeypatch.setattr(engine, "prepare_image", lambda image: decoded.append(image) or prepare(image))
    monkeypatch.setattr(engine, "encode_images", lambda images: encoded.extend(images) or encode(images))
    order = [number // 6 + number % 2 for number in range(60)]  # a b a b a b b c b c b c ...
    rows = [Row(n, picture=pictures[which], question=QUESTIONS[n % 4]) for n, which in enumerate(order)]
    results = list(answer_rows(engine, rows))
    assert sorted(decoded) == sorted(pictures[: max(order) + 1])
    assert len(encoded) == max(order) + 1
    assert sum(result.answer.timings.vision > 0 for result in results if result.answer) == len(encoded)


def test_rows_and_pictures_are_taken_a_bounded_number_ahead(
    engine: Engine, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "WINDOW", 100)
    texts = [base64.b64encode(Path(path).read_bytes()).decode() for path in pictures]
    encode, taken, encoded, most = engine.encode_images, 0, 0, 0

    def counting(images: list[Any]) -> Any:
        nonlocal encoded
        encoded += len(images)
        return encode(images)

    def endless() -> Iterator[Row]:
        nonlocal taken, most
        while True:
            most = max(most, taken - encoded)
            yield to_row(taken, {"image": texts[taken % 40] if taken % 41 else "gone.png", "question": "red?"}, "", Defaults())
            taken += 1

    monkeypatch.setattr(engine, "encode_images", counting)
    results = answer_rows(engine, endless())
    for number in range(150):
        assert next(results).row.number == number
        assert taken <= number + 102
    assert 16 < most <= answering.PLACES + 2 + 150 // 41
    monkeypatch.setattr(answering, "PLACE_BYTES", min(map(len, texts)) // 3)  # now each picture takes four places or more
    results.close()
    assert left_behind() == []
    taken = encoded = most = 0
    results = answer_rows(engine, endless())
    for _ in range(80):
        next(results)
    results.close()
    assert 2 < most <= answering.PLACES // 4 + 2 + 80 // 41


def test_a_slow_answer_holds_up_no_others(engine: Engine, pictures: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    submit, submitted, many = engine.submit, 0, threading.Event()

    class Slow:
        """The first question, which is answered when a hundred others have been."""

        def __init__(self, pending: Any) -> None:
            self._pending = pending

        @property
        def done(self) -> bool:
            return many.is_set()

        def result(self) -> Any:
            assert many.wait(60)
            return self._pending.result()

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal submitted
        submitted += 1
        if submitted == 101:
            many.set()
        pending = submit(*args, **options)
        return Slow(pending) if submitted == 1 else pending

    monkeypatch.setattr(engine, "submit", counting)
    results = list(answer_rows(engine, [Row(n, picture=path, question="red?") for n, path in enumerate(pictures * 3)]))
    assert [result.row.number for result in results] == list(range(120))
    assert not any(result.error for result in results)


def test_an_engine_that_fails_ends_it_after_the_rows_before(
    engine: Engine, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, count = engine.encode_images, 0

    def failing(images: list[Any]) -> Any:
        nonlocal count
        count += len(images)
        if count > 20:
            raise ProviderError("the vision encoder fails: out of memory")
        return encode(images)

    monkeypatch.setattr(engine, "encode_images", failing)
    seen = []
    with pytest.raises(ProviderError, match="out of memory"):
        seen.extend(result.row.number for result in answer_rows(engine, rows_about(pictures, 80)))
    assert seen == list(range(len(seen)))
    assert left_behind() == []


def test_what_makes_rows_may_fail(engine: Engine, pictures: list[str]) -> None:
    def broken() -> Iterator[Row]:
        yield Row(0, picture=pictures[0], question="red?")
        raise InputError("the file ends here")

    with pytest.raises(InputError, match="ends here"):
        list(answer_rows(engine, broken()))
    assert left_behind() == []


def test_leaving_early_ends_the_work(engine: Engine, pictures: list[str]) -> None:
    results = answer_rows(engine, [Row(n, picture=path, question="red?") for n, path in enumerate(pictures)])
    assert next(results).row.number == 0
    results.close()
    assert left_behind() == []
    figures = engine.load_figures()
    assert (figures.waiting, figures.running) in {(0, running) for running in range(figures.slots + 1)}
    assert engine.answer(pictures[0], "what color is the shape?").text


def test_what_is_no_file_is_an_error_row(engine: Engine, pictures: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    given = {
        str(tmp_path / "pipe.png"): "is not a file",
        str(tmp_path): "is a folder",
        "/dev/zero": "is not a file",
        "a\0b": "cannot be read",
        "x" * 5000: "cannot be read",
        "data:image/png,xyz": "is not base64",
        "data:image/png;base64": "is not base64",
        "data:image/png;base64,????": "is not base64",
        "data:image/png;base64,aGVsbG8=": "not a picture",
    }
    rows = [to_row(n, {"image": image, "question": "red?"}, "", Defaults()) for n, image in enumerate(given)]
    for result, message in zip(answer_rows(engine, rows), given.values(), strict=True):
        assert result.error is not None
        assert result.error.code == "image_error"
        assert message in result.error.message


def test_a_data_uri_may_be_broken_into_lines(engine: Engine, pictures: list[str]) -> None:
    text = base64.encodebytes(Path(pictures[0]).read_bytes()).decode()
    row = to_row(0, {"image": f"data:image/png;base64,{text}", "question": "red?"}, "", Defaults())
    (result,) = answer_rows(engine, [row])
    assert result.answer is not None
    assert (result.row.picture, result.row.image) == ("", None)


def test_equal_rows_draw_differently_and_the_same_again(engine: Engine, pictures: list[str]) -> None:
    noisy = GenerateOptions(temperature=50.0, seed=3, max_new_tokens=4)
    rows = [Row(n, picture=pictures[0], question="red?") for n in range(8)]

    def texts() -> list[Any]:
        return [result.answer and result.answer.token_ids for result in answer_rows(engine, rows, options=noisy)]

    first = texts()
    assert len(set(first)) > 4
    assert texts() == first
    assert engine.answer(pictures[0], "red?", options=dataclasses.replace(noisy, seed=5)).token_ids == first[2]


def test_error_rows_alone_need_no_picture(engine: Engine) -> None:
    rows = [failed(Row(n), InputError("no")) for n in range(3)]
    assert [result.error and result.error.code for result in answer_rows(engine, rows)] == ["input_error"] * 3
    assert list(answer_rows(engine, [])) == []


def interrupted(number: int, engine: Engine, rows: list[Row]) -> bool:
    """Answer rows and raise KeyboardInterrupt at this call of a function in answering.py; False if there are fewer."""
    seen = 0

    def trace(frame: FrameType, event: str, arg: object) -> None:
        nonlocal seen
        if event == "call" and frame.f_code.co_filename == answering.__file__:
            seen += 1
            if seen == number:
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        list(answer_rows(engine, rows, threads=2))
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_ctrl_c_anywhere_leaves_an_engine_that_answers(engine: Engine, pictures: list[str]) -> None:
    rows = [Row(n, picture=path, question="red?") for n, path in enumerate(pictures[:5])]
    number = 1
    while interrupted(number, engine, rows):
        assert left_behind() == []
        number += 1
    assert number > 20
    assert len(list(answer_rows(engine, rows))) == 5


def test_encode_images_is_encode_image_of_each(engine: Engine, pictures: list[str]) -> None:
    for path, encoded in zip(pictures[:6], engine.encode_images(pictures[:6]), strict=True):
        one = engine.encode_image(path)
        np.testing.assert_allclose(np.asarray(encoded.image_features), one.image_features, rtol=1e-4, atol=1e-5)
        assert (encoded.width, encoded.height, encoded.bundle_id) == (one.width, one.height, one.bundle_id)
    assert engine.encode_images([]) == []


@pytest.mark.parametrize(("patient", "runs"), [(True, [1, 4]), (False, [1, 1])])
def test_patient_questions_share_a_run_however_long_it_takes(
    patient: bool, runs: list[int], engine: Engine, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._scheduler, "_stall", 0.0)  # no prompt is quick
    steps: list[int] = []
    monkeypatch.setattr(engine._scheduler, "on_step", steps.append)
    encoded = engine.encode_images(pictures[:5])
    assert engine._model.turns is not None
    with engine._model.turns:  # the first one's prompt has to wait until the others are there
        pending = [engine.submit(encoded[0], "red?", patient=patient)]
        while engine.load_figures().running == 0:
            time.sleep(0.001)
        pending += [engine.submit(image, "red?", patient=patient) for image in encoded[1:]]
    answers = [one.result() for one in pending]
    assert steps[:2] == runs
    assert [answer.text for answer in answers] == [engine.answer(path, "red?").text for path in pictures[:5]]
