"""The official VQAv2 files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pgfast.train.data.records import Record, RowError
from pgfast.train.data.sources import open_dataset
from PIL import Image

from pgfast.errors import InputError
from pgfast.image import open_image

HEAD = {"info": {"version": "2.0", "year": 2017}, "data_type": "mscoco", "license": {"name": "CC BY 4.0", "url": "http://x"}}
WORDS = ["net", "net", "mesh", "net", "yes", "mesh", "net", "netting", "net", "mesh"]


def question(id: int, image_id: int, text: str = "What is this?") -> dict[str, Any]:
    return {"image_id": image_id, "question": text, "question_id": id}


def annotation(id: int, words: list[str] = WORDS, choice: str = "net") -> dict[str, Any]:
    answers = [{"answer": word, "answer_confidence": "maybe", "answer_id": n + 1} for n, word in enumerate(words)]
    kinds = {"question_type": "what is this", "answer_type": "other"}
    return {**kinds, "multiple_choice_answer": choice, "answers": answers, "image_id": id // 1000, "question_id": id}


def write(
    folder: Path, questions: list[Any], annotations: list[Any] | None, split: str = "train2014", pictures: str | None = None
) -> Path:
    """Write the files by their official names."""
    (folder / (pictures or split)).mkdir(exist_ok=True)
    path = folder / f"v2_OpenEnded_mscoco_{split}_questions.json"
    path.write_text(json.dumps(HEAD | {"task_type": "Open-Ended", "data_subtype": split, "questions": questions}))
    if annotations is not None:
        whole = HEAD | {"data_subtype": split, "annotations": annotations}
        (folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps(whole))
    return path


def refusal(path: Path, **more: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_dataset(str(path), **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_questions_find_their_annotations_and_pictures(tmp_path: Path) -> None:
    questions = [question(458752000, 458752, " Was it? "), question(9000, 9), question(458752001, 458752)]
    annotations = [annotation(9000, choice="mesh "), annotation(77000), annotation(458752001), annotation(458752000)]
    path = write(tmp_path, questions, annotations)
    Image.new("RGB", (8, 6)).save(tmp_path / "train2014" / "COCO_train2014_000000458752.jpg")
    dataset = open_dataset(str(path))
    picture = f"{tmp_path}/train2014/COCO_train2014_000000458752.jpg"
    assert (dataset.name, len(dataset)) == (path.name, 3)
    assert dataset.record(0) == Record(458752000, picture, "Was it?", False, tuple(WORDS), "net", "other", "what is this")
    assert dataset.record(1).answer == "mesh"
    assert (dataset.record(2).id, dataset.record(2).picture, dataset.image(2)) == (458752001, picture, picture)
    assert open_image(dataset.image(0)).size == (8, 6)


def test_files_and_folders_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, [question(9000, 9)], [annotation(9000)], split="val2014")
    elsewhere = (tmp_path / "v2_mscoco_val2014_annotations.json").rename(tmp_path / "other.json")
    (tmp_path / "val2014").rename(tmp_path / "pictures")
    assert "looked" not in refusal(path, images=tmp_path / "pictures", annotations=tmp_path / "none.json")
    assert "no v2_mscoco_val2014_annotations.json beside it" in refusal(path, images=tmp_path / "pictures")
    assert f"{tmp_path / 'val2014'} is not a folder" in refusal(path, annotations=elsewhere)
    dataset = open_dataset(str(path), images=tmp_path / "pictures", annotations=elsewhere)
    assert dataset.image(0) == f"{tmp_path}/pictures/COCO_val2014_000000000009.jpg"
    assert dataset.record(0).answer == "net"


def test_a_test_split_has_no_answers(tmp_path: Path) -> None:
    dataset = open_dataset(str(write(tmp_path, [question(9000, 9)], None, split="test-dev2015", pictures="test2015")))
    picture = f"{tmp_path}/test2015/COCO_test2015_000000000009.jpg"
    assert dataset.record(0) == Record(9000, picture, "What is this?", False, (), "")


def test_a_bad_row_does_not_stop_the_others(tmp_path: Path) -> None:
    questions = [question(1000, 1, " "), question(2000, 2), question(3000, 3), question(4000, 4) | {"question": 4}]
    annotations = [annotation(1000), annotation(2000, choice=""), annotation(3000, words=["", *WORDS[1:]]), annotation(4000)]
    dataset = open_dataset(str(write(tmp_path, questions, annotations)))
    for row, reason in [(0, "the question is empty"), (1, "the answer is empty"), (3, "question is not text: 4")]:
        with pytest.raises(RowError, match=f"^{reason}$"):
            dataset.record(row)
    assert dataset.record(2).answers == ("", *WORDS[1:])


@pytest.mark.parametrize(
    ("questions", "annotations", "message"),
    [
        ([question(1000, 1), question(2000, 2), question(3000, 3)], [annotation(2000)], "2 of 3 questions have no annotation"),
        ([question(1000, 1), question(1000, 2)], [annotation(1000)], "question_id 1000 is there more than once"),
        ([question(1000, 1)], [annotation(1000), annotation(1000)], "question_id 1000 is there more than once"),
        ([question(1000, 1) | {"question_id": "1000"}], [], "questions[0]: question_id is not a whole number"),
        ([question(1000, 1), {"question_id": 1001}], [], "questions[1]: image_id is missing"),
        ([question(1000, -1)], [], "questions[0]: image_id is not a whole number"),
        ([question(1000, 1 << 63)], [], "questions[0]: image_id is not a whole number"),
        ([question(1000, 1), 5], [], "questions[1] is not an object"),
        ([question(1000, 1)], [annotation(1000) | {"question_id": True}], "annotations[0]: question_id is not a whole number"),
        ([question(1000, 1)], [], "holds no annotations: it is not a VQAv2 file of annotations (its keys: info,"),
        ([], [], "holds no questions: it is not a VQAv2 file of questions (its keys: info,"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, questions: list[Any], annotations: list[Any], message: str) -> None:
    assert message in refusal(write(tmp_path, questions, annotations))


@pytest.mark.parametrize("subtype", [None, 2014, "../train2014", ""])
def test_the_subset_names_pictures(tmp_path: Path, subtype: Any) -> None:
    path = write(tmp_path, [question(1000, 1)], [annotation(1000)])
    path.write_text(json.dumps({"questions": [question(1000, 1)], "data_subtype": subtype}))
    assert "data_subtype is missing or not a name" in refusal(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"questions":\n [{"question_id": 1, "é": "ü" x', "line 2 column 31: Expecting ',' delimiter"),
        ('{"questions": [{"question_id": 1, "image_id": 1}', "line 1 column 49: , or ] is missing"),
        ('{"questions": [{"question_id": 1, "image_id": 1}]', "line 1 column 50: , or } is missing"),
        ('{"questions": []} 5', "line 1 column 19: there is more after the end"),
        ('{"questions" []}', "line 1 column 14: : is missing"),
        ("{5: 1}", "line 1 column 2: a key in quotes is missing"),
        ('{"a": NaN}', "line 1 column 7: NaN is not a JSON number"),
        ('{"a": ' + "[" * 100_000, "line 1 column 8: "),
        ("[1]", "holds no JSON object"),
        ("", "holds no JSON object"),
        ("{}", "holds no questions: it is not a VQAv2 file of questions (its keys: none)"),
    ],
)
def test_broken_json_says_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.json").write_text(text, encoding="utf-8")
    assert message in refusal(tmp_path / "q.json")
