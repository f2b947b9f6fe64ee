"""`pgfast eval`: a bundle and its checkpoint give the same answers and figures, and the report is what it says."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DEMO_CHECKPOINT, Shape, make_checkpoint
from memory_dataset import Memory, easy_slice, one
from pgfast.export import plan
from pgfast.export.checkpoint import DEFAULT_TEMPLATE, PROMPTS_FILE, read_answer_template
from pgfast.export.plan import ExportOptions
from pgfast.train.data.records import Record, RowError
from pgfast.train.demo import easy_vqa_data
from pgfast.train.evaluation import answering, report, transformers_model
from pgfast.train.evaluation.answering import answer_with_bundle, answer_with_checkpoint
from pgfast.train.evaluation.predictions import Answers, Prediction
from pgfast.train.evaluation.report import Evaluation, worst_errors, write_report
from pgfast.train.evaluation.scores import Group, score
from pgfast.train.evaluation.transformers_model import TransformersModel, load_checkpoint
from PIL import Image

import pgfast
from pgfast.engine import Engine
from pgfast.errors import ExportError, InputError, TrainError

STRANGE = "<script>alert('&\"')</script>"


@pytest.fixture(scope="module")
def easy() -> Memory:
    return easy_slice()


@pytest.fixture(scope="module")
def torch_model() -> TransformersModel:
    return load_checkpoint(str(DEMO_CHECKPOINT), device="cpu")


def evaluation_of(dataset: Memory, predictions: dict[int, Prediction], skipped: dict[int, str] | None = None) -> Evaluation:
    pairs = [(dataset.record(row), prediction.text) for row, prediction in predictions.items()]
    return Evaluation(dataset, Answers(predictions, skipped or {}), score(pairs), {"bundle": "x"}, 1.25)


@pytest.fixture
def small() -> Memory:
    """Two pictures, four questions; texts of a stranger."""
    picture = np.full((40, 60, 3), 200, np.uint8)
    records: list[Record | RowError] = [
        one(7, "a.png", "right?", ("yes",) * 10, answer_type="yes/no", question_type="is"),
        one(5, "b.png", STRANGE, (STRANGE,) * 9 + ("no",), answer_type="other"),
        one(6, "a.png", "no reference?", ()),
        one(8, "b.png", "partly?", ("no",) * 2 + ("yes",) * 8, answer_type="yes/no", question_type="is"),
    ]
    return Memory(records, {"a.png": picture, "b.png": np.zeros_like(picture)}, STRANGE)


SMALL = {
    0: Prediction("yes", 0.9),
    1: Prediction(STRANGE[:8], 0.6),
    2: Prediction("who knows", 0.5),
    3: Prediction("no", 0.99),
}


def test_a_bundle_and_its_checkpoint_give_the_same_answers_and_figures(
    demo: Engine, torch_model: TransformersModel, easy: Memory
) -> None:
    ours, theirs = answer_with_bundle(demo, easy), answer_with_checkpoint(torch_model, easy)
    assert list(ours.predictions) == list(theirs.predictions) == list(range(600))
    assert not ours.skipped
    for row in range(600):
        assert ours.predictions[row].text == theirs.predictions[row].text, row
        assert ours.predictions[row].confidence == pytest.approx(theirs.predictions[row].confidence, abs=1e-4)
    scores = [score((easy.record(row), a.predictions[row].text) for row in range(600)) for a in (ours, theirs)]
    assert scores[0] == scores[1]
    assert scores[0].overall is not None
    assert scores[0].overall.accuracy >= 0.99
    assert set(scores[0].by_question_type) == set(easy_vqa_data.KINDS)


def test_answers_are_the_engines_own(demo: Engine, easy: Memory) -> None:
    found = answer_with_bundle(demo, easy, limit=6).predictions
    for row, prediction in found.items():
        record = easy.record(row)
        ask = demo.generate if record.is_prompt else demo.answer
        wanted = ask(easy.image(row), record.text)
        assert (prediction.text, pytest.approx(prediction.confidence)) == (wanted.text, wanted.confidence)


def test_chunks_change_nothing_and_progress_reaches_the_end(
    demo: Engine, torch_model: TransformersModel, easy: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answer_with_bundle(demo, easy, limit=50)
    monkeypatch.setattr(answering, "CHUNK", 7)
    monkeypatch.setattr(transformers_model, "BATCH", 2)
    monkeypatch.setattr(transformers_model, "RECENT", 1)
    seen: list[tuple[int, int]] = []
    parts = answer_with_bundle(demo, easy, limit=50, on_progress=lambda done, total: seen.append((done, total)))
    assert [p.text for p in parts.predictions.values()] == [p.text for p in whole.predictions.values()]
    assert seen == [(min(7 * (i + 1), 50), 50) for i in range(8)]
    theirs = answer_with_checkpoint(torch_model, easy, limit=50)
    assert [p.text for p in theirs.predictions.values()] == [p.text for p in whole.predictions.values()]


def test_a_picture_is_opened_once_per_chunk(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 questions about 4 pictures, in an order that mixes them."""
    pictures = {f"{i}.png": np.full((8, 8, 3), 60 * i, np.uint8) for i in range(4)}
    texts = ["is there a circle?", "what color is the shape?"]
    data = Memory([one(i, f"{i % 4}.png", texts[i % 2], is_prompt=i % 8 > 3) for i in range(40)], pictures)
    opened: list[Any] = []
    encode = demo._model.encode
    monkeypatch.setattr(demo._model, "encode", lambda pixels: opened.extend(pixels) or encode(pixels))
    answer_with_bundle(demo, data)
    assert len(opened) == 2 * 4  # once for the questions, once for the raw prompts


@pytest.mark.parametrize("who", ["bundle", "checkpoint"])
def test_a_bad_row_is_named_or_counted(who: str, demo: Engine, torch_model: TransformersModel, tmp_path: Path) -> None:
    def answer(data: Memory, **options: Any) -> Answers:
        return (
            answer_with_bundle(demo, data, **options)
            if who == "bundle"
            else answer_with_checkpoint(torch_model, data, **options)
        )

    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not a picture")
    good = np.full((8, 8, 3), 255, np.uint8)
    data = Memory(
        [
            one(50, "good", "is there a circle?"),
            one(51, "missing", "is there a circle?"),
            one(52, "broken", "is there a circle?", is_prompt=True),
            one(53, "good", "what is <image> here?"),
            RowError("no question in it"),
            one(5, "good", "  "),
            one(56, "good", "what color is the shape?"),
        ],
        {"good": good, "missing": tmp_path / "missing.jpg", "broken": str(broken)},
    )
    found = answer(data, skip_bad=True)
    assert {row: re.sub(r".*/", "", reason)[:27] for row, reason in found.skipped.items()} == {
        1: "missing.jpg does not exist",
        2: "broken.jpg is not a picture"[:27],
        3: "the text contains <image>, ",
        4: "no question in it",
        5: "the question is empty: ask ",
    }
    assert list(found.predictions) == [0, 1, 2, 3, 5, 6]
    assert [row for row, p in found.predictions.items() if p.confidence is None] == [1, 2, 3, 5]
    assert found.predictions[6].text == answer(Memory([data.records[6]], data.pictures)).predictions[0].text
    for row, words in {
        1: r"row 0 \(question 51\) of memory: .*missing.jpg does not exist; .*--skip-bad",
        4: "row 0 of memory: no q",
    }.items():
        with pytest.raises(InputError, match=words):
            answer(Memory([data.records[row]], data.pictures))
    with pytest.raises(InputError, match="rows 0 and 1 of memory have the same question id 50"):
        answer(Memory([data.records[0], data.records[0]], data.pictures))


def test_scores_by_type(small: Memory) -> None:
    found = score((small.record(row), prediction.text) for row, prediction in SMALL.items())
    assert found.overall == Group(pytest.approx(1.6 / 3), 3)
    assert found.by_answer_type == {"yes/no": Group(pytest.approx(0.8), 2), "other": Group(0.0, 1)}
    assert list(found.by_answer_type) == ["yes/no", "other"]
    assert found.by_question_type == {"is": Group(pytest.approx(0.8), 2)}
    assert (found.unscored, found.mode) == (1, "official")
    nothing = score([(small.record(2), "x")], "simple")
    assert (nothing.overall, nothing.unscored, nothing.mode) == (None, 1, "simple")


def test_results_are_those_that_evalai_takes(small: Memory, tmp_path: Path) -> None:
    write_report(evaluation_of(small, SMALL), tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(set(row) == {"question_id", "answer"} for row in results)
    assert all(type(row["question_id"]) is int and type(row["answer"]) is str for row in results)
    assert [row["question_id"] for row in results] == [7, 5, 6, 8]
    assert [row["answer"] for row in results] == [prediction.text for prediction in SMALL.values()]
    write_report(evaluation_of(Memory([], {}), {}), tmp_path / "empty")
    assert json.loads((tmp_path / "empty" / "results.json").read_text()) == []


def test_every_question_is_written_with_its_score(small: Memory, tmp_path: Path) -> None:
    predictions = SMALL | {3: Prediction("", None)}
    write_report(evaluation_of(small, predictions, {3: "gone"}), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "questions.jsonl").read_text().splitlines()]
    assert [line["accuracy"] for line in lines] == [1.0, 0.0, None, 0.0]
    assert lines[0] == {
        "id": 7,
        "picture": "a.png",
        "question": "right?",
        "prediction": "yes",
        "answers": ["yes"] * 10,
        "accuracy": 1.0,
        "confidence": 0.9,
        "answer_type": "yes/no",
        "question_type": "is",
    }
    assert (lines[3]["skipped"], lines[3]["confidence"]) == ("gone", None)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["overall"] == {"accuracy": pytest.approx(1 / 3), "count": 3}
    assert summary["skipped_rows"] == [{"row": 3, "reason": "gone"}]
    assert (summary["questions"], summary["unscored"], summary["skipped"], summary["seconds"]) == (4, 1, 1, 1.2)
    assert (summary["mode"], summary["data"], summary["model"]) == ("official", STRANGE, {"bundle": "x"})


class Page(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_escapes_what_strangers_wrote_and_holds_its_pictures(small: Memory, tmp_path: Path) -> None:
    write_report(evaluation_of(small, SMALL), tmp_path / "out")
    text = (tmp_path / "out" / "errors.html").read_text()
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe"}
    assert STRANGE in page.texts  # the question, as text
    assert any(f"{STRANGE} (9 times), no" in part for part in page.texts)
    assert "http:" not in text
    assert "https:" not in text
    assert "prefers-color-scheme:dark" in text
    sources = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 2
    for source in sources:
        head, data = source.split(",")
        assert head == "data:image/jpeg;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (picture.format, picture.size) == ("JPEG", (60, 40))
        assert np.asarray(picture).max() < 10  # both errors are about the black picture


def test_the_page_shows_the_surest_errors_first(small: Memory, tmp_path: Path) -> None:
    evaluation = evaluation_of(small, SMALL)
    # 0.6 sure and all wrong costs more than 0.99 sure and 40 % wrong
    assert [error.record.id for error in worst_errors(evaluation, 10)] == [5, 8]
    assert [error.record.id for error in worst_errors(evaluation, 1)] == [5]
    assert worst_errors(evaluation_of(small, {1: Prediction("", None)}, {1: "gone"}), 10) == []
    write_report(evaluation, tmp_path / "out", worst=1)
    assert (tmp_path / "out" / "errors.html").read_text().count("<article>") == 1


def test_pictures_on_the_page_are_small_and_may_be_gone(small: Memory, tmp_path: Path) -> None:
    small.pictures["b.png"] = np.zeros((3000, 1500, 3), np.uint8)
    large = report._thumbnail(small.pictures["b.png"])
    assert Image.open(io.BytesIO(large)).size == (128, 256)
    small.pictures["b.png"] = str(tmp_path / "<gone>.jpg")
    write_report(evaluation_of(small, SMALL), tmp_path / "out")
    text = (tmp_path / "out" / "errors.html").read_text()
    assert "&lt;gone&gt;.jpg does not exist" in text
    assert "<img" not in text


def test_a_report_appears_whole_or_not_at_all(small: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = evaluation_of(small, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(report, "_write_page", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(InputError, match="No space left"):
            write_report(evaluation, tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())
    write_report(evaluation, tmp_path / "deep" / "out")
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == [
        "errors.html",
        "questions.jsonl",
        "results.json",
        "summary.json",
    ]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    with pytest.raises(InputError, match="out exists: choose another folder"):
        write_report(evaluation, tmp_path / "deep" / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(evaluation, tmp_path / "file" / "out")


def test_templates_of_a_checkpoint(tmp_path: Path) -> None:
    assert read_answer_template([tmp_path], None) == DEFAULT_TEMPLATE
    assert read_answer_template([tmp_path], "ask {text}") == "ask {text}"
    with pytest.raises(InputError, match="must stand where the question belongs"):
        read_answer_template([tmp_path], "ask")
    path = tmp_path / PROMPTS_FILE
    path.write_text('{"answer": "answer {text}"}')
    assert read_answer_template([tmp_path], None) == read_answer_template([tmp_path], "answer {text}") == "answer {text}"
    with pytest.raises(InputError, match="leave --answer-template out"):
        read_answer_template([tmp_path], "ask {text}")
    for damaged in ("{", "[]", "{}", '{"answer": 3}', '{"answer": "no place"}'):
        path.write_text(damaged)
        with pytest.raises(InputError, match=r"is not of the form|must stand where"):
            read_answer_template([tmp_path], None)


def test_the_template_decides_what_the_checkpoint_is_asked(
    easy: Memory, torch_model: TransformersModel, tmp_path: Path
) -> None:
    """Under another prefix the demo model is asked something else, and that prefix written out as raw prompts is the same."""
    copy = shutil.copytree(DEMO_CHECKPOINT, tmp_path / "copy")
    (copy / "pgfast_prompts.json").write_text('{"answer": "{text} {language} answer"}')
    other = answer_with_checkpoint(load_checkpoint(str(copy), device="cpu"), easy, limit=30, language="en").predictions
    records = [easy.record(row) for row in range(30)]
    prompts = [
        dataclasses.replace(record, text=record.text if record.is_prompt else f"{record.text} en answer", is_prompt=True)
        for record in records
    ]
    written_out = answer_with_checkpoint(torch_model, Memory([*prompts], easy.pictures)).predictions
    plain = answer_with_checkpoint(torch_model, easy, limit=30).predictions
    for row in range(30):
        assert other[row].text == written_out[row].text
        assert other[row].confidence == pytest.approx(written_out[row].confidence, abs=1e-5)
    assert any(abs(other[row].confidence - plain[row].confidence) > 1e-4 for row in range(30))


def test_limits_are_those_of_a_bundle(torch_model: TransformersModel, demo: Engine) -> None:
    assert torch_model.max_tokens == demo.manifest.limits.new_tokens == demo.manifest.limits.prompt_tokens
    assert transformers_model.TEXT_TOKENS == plan.TEXT_TOKENS


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_counts(tmp_path: Path) -> None:
    """What a bundle exported with the adapter answers, the checkpoint with it answers too; without it, something else."""
    from pgfast.export.build import export
    from test_export_lora import make_adapter

    checkpoint = make_checkpoint(tmp_path / "base", Shape(max_positions=64))
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    export(str(checkpoint), tmp_path / "bundle", ExportOptions(adapter=adapter))
    rng = np.random.default_rng(3)
    pictures = {str(i): rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for i in range(6)}
    data = Memory([one(i, str(i), "what color is the circle?") for i in range(6)], pictures)
    with pgfast.load(tmp_path / "bundle", provider="cpu") as engine:
        ours = answer_with_bundle(engine, data).predictions
    merged = load_checkpoint(str(checkpoint), adapter=adapter, device="cpu")
    theirs = answer_with_checkpoint(merged, data).predictions
    assert [p.text for p in ours.values()] == [p.text for p in theirs.values()]
    assert theirs != answer_with_checkpoint(load_checkpoint(str(checkpoint), device="cpu"), data).predictions
    assert merged.described["adapter"] == "adapter"
    with pytest.raises(InputError, match="has no adapter_config"):
        load_checkpoint(str(checkpoint), adapter=tmp_path)
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(TrainError, match="PEFT cannot merge"):
        load_checkpoint(str(checkpoint), adapter=adapter)


def test_checkpoints_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="neither a folder nor a Hub id"):
        load_checkpoint(str(tmp_path / "nothing"))
    with pytest.raises(ExportError, match=r"no config.json"):
        load_checkpoint(str(tmp_path))
    with pytest.raises(InputError, match="has no 'tensorrt' here"):
        load_checkpoint(str(DEMO_CHECKPOINT), device="tensorrt")
    copy = shutil.copytree(DEMO_CHECKPOINT, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    with pytest.raises(TrainError, match="transformers cannot load"):
        load_checkpoint(str(copy), device="cpu")


# ---- the command
