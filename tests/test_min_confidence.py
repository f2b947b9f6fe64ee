"""Calibrated confidence, and "unsure" below a confidence: in the engine, on the command line, over files and HTTP."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pgfast.train.evaluation.calibration import store
from server_tools import serving

import pgfast
from pgfast import GenerateOptions
from pgfast.batch.answering import answer_rows
from pgfast.batch.rows import Row
from pgfast.bundle import Bundle
from pgfast.cli import main
from pgfast.engine import Engine
from pgfast.errors import InputError
from pgfast.loading import demo_bundle
from pgfast.manifest import Calibration

QUESTION = "what color is the shape?"
PICTURE = demo_bundle().parent / "blue_circle.png"
PICTURE_URI = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The demo model with a calibration."""
    folder = tmp_path_factory.mktemp("calibrated") / "bundle"
    shutil.copytree(demo_bundle(), folder)
    store(folder, Bundle.open(folder).manifest.digest(), Calibration(3.5, 0.1, 0.05, 200))
    with pgfast.load(folder, provider="cpu", threads=1) as engine:
        yield engine


def between(answer: pgfast.Answer) -> tuple[GenerateOptions, GenerateOptions]:
    """Options that the calibrated confidence passes just so, and just not."""
    assert answer.calibrated is not None
    assert answer.calibrated + 1e-6 < answer.confidence
    return GenerateOptions(min_confidence=answer.calibrated - 1e-6), GenerateOptions(min_confidence=answer.calibrated + 1e-6)


def test_an_answer_has_both_confidences(engine: Engine) -> None:
    answer, choice = engine.answer(PICTURE, QUESTION), engine.answer(PICTURE, QUESTION, choices=["green", "blue"])
    for found in (answer, choice):
        assert found.confidence == pytest.approx(math.exp(math.fsum(found.token_logprobs)))
        odds = (found.confidence / (1 - found.confidence)) ** (1 / 3.5)
        assert found.calibrated == pytest.approx(odds / (1 + odds))
        assert found.unsure_of is None


def test_below_min_confidence_the_answer_is_unsure(engine: Engine) -> None:
    sure = engine.answer(PICTURE, QUESTION)
    passes, fails = between(sure)
    assert engine.answer(PICTURE, QUESTION, options=passes).text == sure.text == "blue"
    unsure = engine.answer(PICTURE, QUESTION, options=fails)
    assert (unsure.text, unsure.unsure_of) == ("unsure", "blue")
    assert (unsure.confidence, unsure.calibrated, unsure.token_ids) == (sure.confidence, sure.calibrated, sure.token_ids)
    questions: list[Any] = [(PICTURE, QUESTION), (PICTURE, "is there a circle?")]
    certain = engine.answer_batch(questions)
    batch = engine.answer_batch(questions, options=fails)
    for plain, found in zip(certain, batch, strict=True):
        assert plain.calibrated is not None
        is_unsure = plain.calibrated < (fails.min_confidence or 0)
        assert (found.text, found.unsure_of) == (("unsure", plain.text) if is_unsure else (plain.text, None))
    assert batch[0].text == "unsure"
    assert engine.generate(PICTURE, f"answer en {QUESTION}", options=fails).unsure_of == "blue"


def test_a_choice_may_be_unsure_too(engine: Engine) -> None:
    """By its own probability, not by its share: the most probable of wrong choices is no answer."""
    found = engine.answer(PICTURE, QUESTION, choices=["red", "circle"], options=GenerateOptions(min_confidence=0.5))
    assert found.text == "unsure"
    assert found.choices is not None
    assert found.unsure_of == max(found.choices, key=lambda choice: (found.choices or {})[choice])
    assert max(found.choices.values()) > 0.5
    assert engine.answer(PICTURE, QUESTION, choices=["red", "blue"], options=GenerateOptions(min_confidence=0.5)).text == "blue"


def test_without_a_calibration_the_plain_confidence_counts(tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(demo_bundle(), copy)
    (copy / "pgfast.json").write_text(dataclasses.replace(Bundle.open(copy).manifest, calibration=None).to_json())
    with pgfast.load(copy, provider="cpu", threads=1) as engine:
        plain = engine.answer(PICTURE, QUESTION)
        assert plain.calibrated is None
        below, above = plain.confidence - 1e-9, plain.confidence + 1e-9
        assert engine.answer(PICTURE, QUESTION, options=GenerateOptions(min_confidence=below)).text == "blue"
        assert engine.answer(PICTURE, QUESTION, options=GenerateOptions(min_confidence=above)).unsure_of == "blue"


@pytest.mark.parametrize("least", [-0.1, 1.1, float("nan"), "0.5", True])
def test_a_min_confidence_is_from_0_to_1(engine: Engine, least: Any) -> None:
    with pytest.raises(InputError, match=r"min_confidence is .*: a number from 0 to 1 is needed"):
        engine.answer(PICTURE, QUESTION, options=GenerateOptions(min_confidence=least))


def test_a_stream_has_no_min_confidence(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    options = GenerateOptions(min_confidence=0.0)
    with pytest.raises(InputError, match="a stream cannot take a piece back"):
        engine.stream(PICTURE, "caption en", options=options)  # before anybody reads it
    with pytest.raises(InputError, match="a stream cannot take a piece back"):
        engine.submit(PICTURE, QUESTION, options=options, streaming=True)
    code, printed, err = run(capsys, "generate", str(PICTURE), "caption en", "--stream", "--min-confidence", "0.5")
    assert (code, printed) == (2, "")
    assert "a stream cannot take a piece back" in err.splitlines()[-1]


def test_the_command_takes_a_min_confidence(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "answer", str(PICTURE), QUESTION, "--min-confidence", "1")
    assert (code, printed) == (0, "unsure\n")
    shown = json.loads(run(capsys, "answer", str(PICTURE), QUESTION, "--min-confidence", "1", "--json")[1])
    assert (shown["text"], shown["unsure_of"]) == ("unsure", "blue")
    assert run(capsys, "answer", str(PICTURE), QUESTION, "--min-confidence", "0.5")[1] == "blue\n"


def test_a_file_of_questions(engine: Engine) -> None:
    rows = [Row(i, image=str(PICTURE), picture=str(PICTURE), question=QUESTION) for i in range(2)]
    passes, fails = between(engine.answer(PICTURE, QUESTION))
    for options, text, original in ((passes, "blue", None), (fails, "unsure", "blue")):
        for result, row in itertools.zip_longest(answer_rows(engine, rows, options=options), rows):
            record = result.record()
            assert record["row"] == row.number
            assert (record["text"], record["unsure_of"]) == (text, original)
            assert 0 < record["calibrated"] < record["confidence"]


def test_a_run_is_not_continued_under_another_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, rows, out = tmp_path / "bundle", tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    shutil.copytree(demo_bundle(), bundle)
    manifest = Bundle.open(bundle).manifest
    store(bundle, manifest.digest(), Calibration(3.5, 0.1, 0.05, 200))
    rows.write_text(json.dumps({"image": str(PICTURE), "question": QUESTION}) + "\n")
    command = ["batch", str(rows), str(out), "-m", str(bundle), "--min-confidence", "1"]
    assert run(capsys, *command)[0] == 0
    assert json.loads(out.read_text())["unsure_of"] == "blue"
    store(bundle, manifest.digest(), Calibration(2.0, 0.1, 0.05, 200))
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "bundle temperature was 3.5 and is 2.0" in err


def test_over_the_wire(engine: Engine) -> None:
    passes, fails = between(engine.answer(PICTURE, QUESTION))
    with serving(engine) as server:
        assert server.ask(min_confidence=passes.min_confidence).json["text"] == "blue"
        found = server.ask(min_confidence=fails.min_confidence).json
        assert (found["text"], found["unsure_of"]) == ("unsure", "blue")
        assert 0 < found["calibrated"] < found["confidence"]
        for bad in (2, "x"):
            assert server.ask(min_confidence=bad).status == 400
        body = {"image": PICTURE_URI, "question": QUESTION, "min_confidence": 0.5}
        refused = server.request("POST", "/v1/answer?stream=1", body)
        assert refused.status == 400
        assert "a stream cannot take a piece back" in refused.json["error"]["message"]
        content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": PICTURE_URI}}]
        chat = {"model": server.service.model, "messages": [{"role": "user", "content": content}]}
        choice = server.request("POST", "/v1/chat/completions", chat).json["choices"][0]
        assert choice["calibrated"] == pytest.approx(found["calibrated"], rel=1e-4)
        streamed = server.request("POST", "/v1/chat/completions", chat | {"stream": True}).body
        said = re.search(rb'"calibrated":([0-9.]+)', streamed)
        assert said is not None
        assert float(said[1]) == pytest.approx(found["calibrated"], rel=1e-4)
