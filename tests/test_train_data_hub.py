"""Data sets that `datasets` saved, and the Hub as far as it can be had without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from pgfast.train.data.hugging_face import HuggingFaceDataset
from pgfast.train.data.records import Record, RowError
from pgfast.train.data.sources import open_dataset
from PIL import Image

from pgfast.errors import InputError
from pgfast.image import open_image

COLORS = ["red", "blue", "green"]


def table(folder: Path, **columns: list[Any]) -> datasets.Dataset:
    """Three pictures, the third one twice, and columns of four rows."""
    files = []
    for color in COLORS:
        files.append(str(folder / f"{color}.png"))
        Image.new("RGB", (8, 6), color).save(files[-1])
    return datasets.Dataset.from_dict({"image": [*files, files[-1]], **columns}).cast_column("image", datasets.Image())


def saved(folder: Path, **columns: list[Any]) -> str:
    table(folder, **columns).save_to_disk(folder / "saved")
    return str(folder / "saved")


def refusal(spec: str) -> str:
    with pytest.raises(InputError) as caught:
        open_dataset(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_saved_folder_in_the_form_of_vqav2(tmp_path: Path) -> None:
    ten = [{"answer": word, "answer_confidence": "yes", "answer_id": n + 1} for n, word in enumerate("baabcccdde")]
    spec = saved(
        tmp_path,
        question=[" what? "] * 4,
        answers=[ten, ten, ten, None],
        multiple_choice_answer=["a", None, "b", None],
        question_id=[7, 8, 9, 10],
        image_id=[1, 2, 3, 3],
        answer_type=["other"] * 4,
        something=[1.5] * 4,
    )
    dataset = open_dataset(spec)
    words = tuple("baabcccdde")
    assert (dataset.name, len(dataset)) == ("saved", 4)
    assert dataset.record(0) == Record(7, "saved/1", "what?", False, words, "a", "other")
    assert dataset.record(1).answer == "c"
    assert dataset.record(2).picture == dataset.record(3).picture == "saved/3"
    assert (dataset.record(3).answers, dataset.record(3).answer) == ((), "")
    for row, color in enumerate([*COLORS, COLORS[-1]]):
        assert dataset.image(row) == (tmp_path / f"{color}.png").read_bytes()


def test_prefixes_and_no_image_id(tmp_path: Path) -> None:
    dataset = open_dataset(saved(tmp_path, prefix=["caption en"] * 4, suffix=["red", "blue", "green", " "]))
    assert dataset.record(1) == Record(1, "saved/row 1", "caption en", True, ("blue",), "blue")
    assert dataset.record(2).picture == "saved/row 2"
    with pytest.raises(RowError, match="the answer is empty"):
        dataset.record(3)


def test_a_record_is_read_without_its_picture(tmp_path: Path) -> None:
    """A picture that is no picture is found only by whoever opens it."""
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
    rows = {"image": [{"bytes": b"nothing", "path": None}, None], "question": ["what?"] * 2}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    dataset = open_dataset(str(tmp_path / "saved"))
    assert [dataset.record(row).text for row in range(2)] == ["what?"] * 2
    assert dataset.image(0) == b"nothing"
    with pytest.raises(RowError, match="there is no picture"):
        dataset.image(1)


def test_pictures_by_path_stay_in_their_folder(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    rows = {"image": ["a.png", "../a.png", str(tmp_path / "a.png")], "question": ["what?"] * 3}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    dataset = open_dataset(str(tmp_path / "saved"), images=tmp_path)
    assert dataset.record(0).picture == dataset.record(2).picture == dataset.image(0) == str(tmp_path / "a.png")
    assert open_image(dataset.image(2)).size == (8, 6)
    with pytest.raises(RowError, match="leaves the folder"):
        dataset.record(1)


def test_splits_and_wrong_columns(tmp_path: Path) -> None:
    questions = table(tmp_path, question=["what?"] * 4, answer=["a"] * 4)
    datasets.DatasetDict({"train": questions, "validation": questions}).save_to_disk(tmp_path / "both")
    assert refusal(str(tmp_path / "both")).endswith(f"give one of {tmp_path}/both/train, {tmp_path}/both/validation")
    assert len(open_dataset(str(tmp_path / "both" / "train"))) == 4
    questions.rename_column("question", "text").save_to_disk(tmp_path / "text")
    assert "needs the columns image and question or prefix: it has answer, image, text" in refusal(str(tmp_path / "text"))
    questions.remove_columns("image").add_column("image", [1, 2, 3, 4]).save_to_disk(tmp_path / "numbers")
    assert "the column image holds Value('int64')" in refusal(str(tmp_path / "numbers"))
    with pytest.raises(InputError, match="empty holds no rows"):
        HuggingFaceDataset(questions.select([]), "empty", str(tmp_path))
    (tmp_path / "text" / "state.json").write_text("{")
    assert "text cannot be read as a data set" in refusal(str(tmp_path / "text"))


def test_a_saved_format_is_not_used(tmp_path: Path) -> None:
    """Torch's would make tensors of the numbers."""
    questions = table(tmp_path, question=["what?"] * 4, question_id=[5, 6, 7, 8])
    questions.with_format("torch").save_to_disk(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "state.json").read_text())["_format_type"] == "torch"
    dataset = open_dataset(str(tmp_path / "saved"))
    assert [dataset.record(row).id for row in range(4)] == [5, 6, 7, 8]
    assert dataset.image(0) == (tmp_path / "red.png").read_bytes()


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    spec = saved(tmp_path, question=["what?"] * 4)
    code = (
        "import sys; from pgfast.train.data import preflight, sources\n"
        f"found = preflight.check(sources.open_dataset({spec!r}), str)\n"
        "assert len(found.good) == 4 and 'datasets' in sys.modules\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_hub_without_a_network_is_one_line() -> None:
    for spec in ("pgfast-nobody/nothing", "pgfast-nobody/nothing:train"):
        message = refusal(spec)
        assert message.startswith("pgfast-nobody/nothing is no local file or folder, and cannot be had from the Hub (")
        assert message.endswith("without a network give a folder that `datasets` saved")


def test_a_split_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, splits = list[tuple[str, str]](), ["train", "test"]
    questions = table(tmp_path, question=["what?"] * 4)

    def load(id: str, split: str) -> datasets.Dataset:
        asked.append((id, split))
        return questions

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda id: splits)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path))
    dataset = open_dataset("org/some.name:train[:4]")
    assert (dataset.name, len(dataset)) == ("org/some.name:train[:4]", 4)
    assert dataset.image(1) == str(tmp_path / "blue.png")  # a file in the cache
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(RowError, match="leaves the folder"):
        open_dataset("org/some.name:train", images=tmp_path / "elsewhere").image(1)
    assert refusal("org/name") == "org/name has several splits: give one of org/name:train, org/name:test"
    splits.pop()
    assert open_dataset("org/name").name == "org/name:train"
    assert asked == [("org/some.name", "train[:4]"), ("org/some.name", "train"), ("org/name", "train")]
