"""Training data: every format from files that are written here."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pgfast.train.data import json_file
from pgfast.train.data.records import Dataset, Record, RowError
from pgfast.train.data.sources import open_dataset
from PIL import Image

from pgfast.errors import InputError, MissingDependencyError
from pgfast.image import open_image

ROW = {"image": "a.jpg", "question": "what?", "answer": "cat"}


def save_picture(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), color).save(path)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def records(dataset: Dataset) -> list[Record]:
    return [dataset.record(row) for row in range(len(dataset))]


def reason(dataset: Dataset, row: int) -> str:
    with pytest.raises(RowError) as caught:
        dataset.record(row)
    return str(caught.value)


def refusal(spec: object, **more: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_dataset(str(spec), **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_easy_vqa() -> None:
    import easy_vqa

    dataset = open_dataset("easy-vqa:test")
    questions, answers, ids = easy_vqa.get_test_questions()
    assert (dataset.name, len(dataset)) == ("easy-vqa:test", 9673)
    assert [(r.text, r.answer, r.picture) for r in records(dataset)] == [
        (question, answer, f"easy-vqa/test/{id}") for question, answer, id in zip(questions, answers, ids, strict=True)
    ]
    assert {(r.answer_type, r.answer in ("yes", "no")) for r in records(dataset)} == {("yes/no", True), ("other", False)}
    on_disk = np.asarray(Image.open(easy_vqa.get_test_image_paths()[ids[17]]).convert("RGB"))
    assert np.array_equal(dataset.image(17), on_disk)


def test_easy_vqa_has_two_splits_and_its_own_pictures(tmp_path: Path) -> None:
    assert "easy-vqa:validation does not exist" in refusal("easy-vqa:validation")
    assert "brings its own pictures" in refusal("easy-vqa:test", images=tmp_path)


@pytest.mark.parametrize("module", ["easy_vqa", "datasets"])
def test_a_missing_library_says_what_to_install(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "state.json").write_text("{}")
    for spec in {"easy_vqa": ["easy-vqa:test"], "datasets": [str(tmp_path), "org/name"]}[module]:
        with pytest.raises(MissingDependencyError, match="is not installed: pip install"):
            open_dataset(spec)


def test_rows_as_maestro_and_roboflow_write_them(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        save_picture(tmp_path / split / "a.jpg")
        rows = [{"image": "a.jpg", "prefix": f"detect {split} ; ü\n", "suffix": " <loc0001>x "}]
        write_jsonl(tmp_path / split / "annotations.jsonl", rows)
    dataset = open_dataset(str(tmp_path / "valid"))
    picture = str(tmp_path / "valid" / "a.jpg")
    assert dataset.name == "valid/annotations.jsonl"
    assert records(dataset) == [Record(0, picture, "detect valid ; ü\n", True, ("<loc0001>x",), "<loc0001>x")]
    assert open_image(dataset.image(0)).size == (8, 6)
    assert refusal(tmp_path).endswith(f"give one of {tmp_path / 'test'}, {tmp_path / 'train'}, {tmp_path / 'valid'}")


def test_roboflow_puts_all_splits_into_one_folder(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"_annotations.{split}.jsonl", [ROW]) for split in ("test", "train")]
    assert f"give one of {files[0]}, {files[1]}" in refusal(tmp_path)
    assert open_dataset(str(files[1])).name == f"{tmp_path.name}/_annotations.train.jsonl"
    files[0].unlink()
    assert records(open_dataset(str(tmp_path)))[0].answer == "cat"


def test_all_keys_of_a_row(tmp_path: Path) -> None:
    ten = [{"answer": word, "answer_confidence": "yes", "answer_id": n + 1} for n, word in enumerate("baabcccdde")]
    row = {
        "image": "x/a.png",
        "question": "  what is it?\t",
        "answers": ten,
        "question_id": "q-1",
        "unknown": 1,
        "suffix": None,
    }
    path = write_jsonl(tmp_path / "data.jsonl", [row | {"answer_type": "other", "question_type": "what is"}])
    dataset = open_dataset(str(path), images=tmp_path / "..")
    (record,) = records(dataset)
    assert record == Record(
        "q-1", str(tmp_path.parent / "x/a.png"), "what is it?", False, tuple("baabcccdde"), "c", "other", "what is"
    )
    assert dataset.image(0) == record.picture


@pytest.mark.parametrize(
    ("fields", "answers", "answer"),
    [
        ({"answers": ["no", " yes ", "yes", "no"]}, ("no", "yes", "yes", "no"), "no"),  # a tie: the first
        ({"answers": ["", "", "cat"]}, ("", "", "cat"), "cat"),  # two annotators wrote nothing
        ({"answers": ["a", "b", "b"], "answer": "a"}, ("a", "b", "b"), "a"),
        ({"answer": "a", "suffix": "b", "multiple_choice_answer": "c"}, ("c",), "c"),
        ({"answers": [{"answer": "a"}, "b"], "suffix": "b"}, ("a", "b"), "b"),
        ({"answers": {"answer": ["a", "b", "b"], "answer_id": [1, 2, 3]}}, ("a", "b", "b"), "b"),
        ({"answers": [], "answer": None}, (), ""),
        ({}, (), ""),
    ],
)
def test_which_answer_is_trained(tmp_path: Path, fields: dict[str, Any], answers: tuple[str, ...], answer: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"image": "a.jpg", "question": "?"} | fields])
    (record,) = records(open_dataset(str(path)))
    assert (record.answers, record.answer) == (answers, answer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " \n"}, "the question is empty"),
        ({"question": None, "prefix": "  "}, "the question is empty"),
        ({"question": None}, "neither of question and prefix is there"),
        ({"prefix": "answer en"}, "both of question and prefix is there"),
        ({"question": 5}, "question is not text: 5"),
        ({"question": "a\ud800"}, "question holds half a character"),
        ({"answer": "  "}, "the answer is empty"),
        ({"answer": None, "answers": ["", " "]}, "the answer is empty"),
        ({"answer": 3}, "answer is not text: 3"),
        ({"answers": "cat"}, "answers is not a list: 'cat'"),
        ({"answers": ["cat", 4]}, "answers is not text: 4"),
        ({"question_id": 1.5}, "question_id is neither a whole number nor text: 1.5"),
        ({"question_id": True}, "question_id is neither a whole number nor text: True"),
        ({"answer_type": 1}, "answer_type is not text: 1"),
        ({"image": None}, "image is not a path: None"),
        ({"image": ""}, "image is not a path: ''"),
        ({"image": "a\0.jpg"}, "image is not a path: 'a\\x00.jpg'"),
        ({"image": "."}, "the picture's path leaves the folder of pictures: '.'"),
        ({"image": "../data2/a.jpg"}, "the picture's path leaves the folder of pictures: '../data2/a.jpg'"),
        ({"image": "x/../../a.jpg"}, "the picture's path leaves the folder of pictures: 'x/../../a.jpg'"),
        ({"image": "/etc/passwd"}, "the picture's path leaves the folder of pictures: '/etc/passwd'"),
    ],
)
def test_a_row_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    dataset = open_dataset(str(write_jsonl(tmp_path / "data" / "a.jsonl", [ROW, ROW | change, ROW])))
    assert reason(dataset, 1) == message
    assert dataset.record(0).id == 0
    assert dataset.record(2).id == 2


def test_paths_and_links_inside_the_folder_are_fine(tmp_path: Path) -> None:
    real = save_picture(tmp_path / "elsewhere" / "a.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.jpg").symlink_to(real)
    inside = tmp_path / "data" / "link.jpg"
    rows = [ROW | {"image": name} for name in ("x/../link.jpg", "./link.jpg", str(inside))]
    dataset = open_dataset(str(write_jsonl(tmp_path / "data" / "a.jsonl", rows)))
    assert {record.picture for record in records(dataset)} == {str(inside)}
    assert open_image(dataset.image(0)).size == (8, 6)


def test_lines_of_every_kind(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + json.dumps(ROW | {"answer": "bom"}).encode(),
        b"\r\n",
        json.dumps(ROW | {"answer": "ü\u2028€𝄞"}, ensure_ascii=False).encode() + b"\r",
        b"  \t",
        b'{"image": "a.jpg" "b"}',
        b'{"question": "\xff"}',
        b"[1]",
        b'{"x": NaN}',
        b"[" * 100_000,
        b'{"x": ' + b"1" * 5000 + b"}",
        json.dumps(ROW | {"answer": "last"}).encode(),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    dataset = open_dataset(str(tmp_path / "a.jsonl"))
    assert len(dataset) == 9
    assert [dataset.record(row).answer for row in (0, 1, 8)] == ["bom", "ü\u2028€𝄞", "last"]
    assert reason(dataset, 2) == "the row is not JSON: Expecting ',' delimiter at column 19"
    assert reason(dataset, 3) == "the row is not UTF-8"
    assert reason(dataset, 4) == "the row is not a JSON object"
    assert reason(dataset, 5) == "the row is not JSON: NaN is not a JSON number"
    assert all(reason(dataset, row).startswith("the row is not JSON: ") for row in (6, 7))


@given(st.lists(st.tuples(st.text(), st.text(), st.booleans()), min_size=1))
def test_any_text_comes_back(rows: list[tuple[str, str, bool]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        with path.open("w", encoding="utf-8", newline="") as file:
            for question, answer, ascii in rows:
                file.write(json.dumps({"image": "a.jpg", "question": question, "answer": answer}, ensure_ascii=ascii) + "\n")
        dataset = open_dataset(str(path))
        assert len(dataset) == len(rows)
        for row, (question, answer, _) in enumerate(rows):
            if question.strip() and answer.strip():
                record = dataset.record(row)
                assert (record.text, record.answer) == (question.strip(), answer.strip())
            else:
                assert reason(dataset, row) == f"the {'answer' if question.strip() else 'question'} is empty"


def test_many_threads_read_one_file(tmp_path: Path) -> None:
    rows = [ROW | {"answer": "é" * (row % 97 + 1), "question_id": row} for row in range(500)]
    dataset = open_dataset(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    together = threading.Barrier(8)

    def read(seed: int) -> list[tuple[int, Record]]:
        together.wait()
        return [(int(row), dataset.record(int(row))) for row in np.random.default_rng(seed).permutation(500)]

    with ThreadPoolExecutor(8) as pool:
        for row, record in (pair for part in pool.map(read, range(8)) for pair in part):
            assert (record.id, record.answer) == (row, rows[row]["answer"])


def test_a_dataset_can_go_to_another_process(tmp_path: Path) -> None:
    rows = [ROW | {"question_id": row} for row in range(3)]
    dataset = open_dataset(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    code = "import pickle, sys; print([pickle.load(sys.stdin.buffer).record(2).id])"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(dataset), capture_output=True, check=True)
    assert done.stdout == b"[2]\n"


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    assert "does not exist: give a VQAv2" in refusal(tmp_path / "none.jsonl")
    assert "holds no rows" in refusal(write_jsonl(tmp_path / "empty.jsonl", []))
    assert "is of no known kind" in refusal(save_picture(tmp_path / "a.png"))
    assert "is no path: " in refusal("x" * 5000)
    assert "is no path: " in refusal("~nobody-of-this-name/a.jsonl")
    assert "is not a folder" in refusal(write_jsonl(tmp_path / "a.jsonl", [ROW]), images=tmp_path / "none")
    assert "takes no annotations" in refusal(tmp_path / "a.jsonl", annotations=tmp_path / "b.json")
    assert "holds no data: looked for annotations.jsonl" in refusal(tmp_path)


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [ROW])
    code = (
        "import sys; from pgfast.train.data import preflight, sources\n"
        f"preflight.check(sources.open_dataset({str(path)!r}), print)\n"
        "assert not {'torch', 'datasets', 'easy_vqa'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_places_in_a_json_file_do_not_depend_on_how_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"a": [{"é": "€"}, {"b": [1, {"c": 2}]}, 12345], "n": 678, "empty": [], "s": 'x\\"]}', "l": [[1], "ü"]}
    text = "\ufeff" + json.dumps(value, ensure_ascii=False, indent=1) + "\n "
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    raw = text.encode()
    flat = [(key, item) for key, items in value.items() for item in (items if isinstance(items, list) else [items])]
    for piece in range(16, 80):
        monkeypatch.setattr(json_file, "_PIECE", piece)
        found = list(json_file.members(tmp_path / "a.json"))
        assert [(key, json.loads(raw[begin:end])) for key, _, begin, end in found] == flat
