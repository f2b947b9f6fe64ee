"""The walk over all rows before training."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pgfast.train.data.preflight import BadRow, check
from pgfast.train.data.records import Record, RowError
from pgfast.train.data.sources import open_dataset
from PIL import Image


def write(folder: Path, rows: list[dict[str, Any] | str]) -> str:
    path = folder / "a.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def row(image: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {"image": image, "question": "what?", "answer": answer, **more}


def png_of(width: int, height: int) -> bytes:
    """A header that promises pixels, and none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b"")]
    packed = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def short_answers(record: Record) -> None:
    if len(record.answer) > 5:
        raise RowError(f"the answer is too long: {len(record.answer)}")


def test_each_fault_is_found_and_counted(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "good.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "large.png").write_bytes(png_of(9000, 9000))  # Pillow would warn at 89 million
    (tmp_path / "bomb.png").write_bytes(png_of(100_000, 100_000))  # Pillow refuses
    (tmp_path / "vector.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n%%EndComments\n")
    names = ["text.jpg", "empty.jpg", "folder.jpg", "large.png", "bomb.png", "vector.eps", "none.jpg", "half\ud800.jpg"]
    rows = [
        row("good.jpg", question_id="a"),
        *(row(name) for name in names),
        row("good.jpg", answer="far too long"),
        row("good.jpg", answer="much too long", question_id="b"),
        "{",
        row("good.jpg", question_id="a"),
        row("none.jpg", answer="no"),
        row("good.jpg", answer="no"),
    ]
    found = check(open_dataset(write(tmp_path, rows)), short_answers)
    reasons = {bad.row: bad.reason for bad in found.bad}
    assert found.good.tolist() == [0, 14]
    assert (found.rows, found.pictures) == (15, 9)
    assert [bad.row for bad in found.bad] == list(range(1, 14))
    assert reasons[1] == f"the picture is in no known format: {tmp_path}/text.jpg"
    assert reasons[2] == f"the picture is in no known format: {tmp_path}/empty.jpg"
    assert reasons[3].startswith("the picture cannot be opened: ")
    assert reasons[4] == f"the picture has more than 80,000,000 pixels: {tmp_path}/large.png"
    assert reasons[5] == f"the picture has more than 80,000,000 pixels: {tmp_path}/bomb.png"
    assert reasons[6] == f"the picture is in no known format: {tmp_path}/vector.eps"
    assert reasons[7] == reasons[13] == f"the picture does not exist: {tmp_path}/none.jpg"
    assert reasons[8].startswith("the picture cannot be opened: ")
    assert BadRow(10, "b", "the answer is too long: 13") in found.bad
    assert (found.bad[10].id, found.bad[10].reason[:20]) == (None, "the row is not JSON:")
    assert BadRow(12, "a", "another row has the same question_id: row 0") in found.bad
    assert found.reasons == {
        "the picture is in no known format": 3,
        "the picture cannot be opened": 2,
        "the picture has more than 80,000,000 pixels": 2,
        "the picture does not exist": 2,
        "the answer is too long": 2,
        "the row is not JSON": 1,
        "another row has the same question_id": 1,
    }
    assert list(found.reasons.values()) == sorted(found.reasons.values(), reverse=True)
    found.write_report(tmp_path / "report.jsonl")
    report = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert report == [{"row": bad.row, "id": bad.id, "reason": bad.reason} for bad in found.bad]


class Counting:
    """Five rows about two pictures; it counts what is asked of it."""

    name = "counting"

    def __init__(self) -> None:
        self.opened = list[int]()

    def __len__(self) -> int:
        return 5

    def record(self, row: int) -> Record:
        return Record(row, f"picture {row % 2}", "what?", False, (), "")

    def image(self, row: int) -> Any:
        self.opened.append(row)
        return np.zeros((4, 4, 3), np.uint8)


def test_each_picture_is_opened_once_and_progress_is_told() -> None:
    dataset, told = Counting(), list[tuple[str, int, int, str]]()
    found = check(dataset, str, on_progress=lambda *what: told.append(what))
    assert sorted(dataset.opened) == [0, 1]
    assert told == [("rows", 5, 5, "0 bad"), ("pictures", 2, 2, "0 bad")]
    assert (found.good.tolist(), found.good.dtype, found.bad, found.reasons) == ([0, 1, 2, 3, 4], np.int64, [], {})


def test_a_picture_of_refused_rows_is_not_opened() -> None:
    dataset = Counting()

    def encode(record: Record) -> None:
        if record.picture == "picture 1":
            raise RowError("no")

    assert check(dataset, encode).good.tolist() == [0, 2, 4]
    assert dataset.opened == [0]


def test_other_errors_are_not_swallowed() -> None:
    def encode(record: Record) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        check(Counting(), encode)


def test_all_of_easy_vqa_is_good() -> None:
    found = check(open_dataset("easy-vqa:test"), lambda record: None)
    assert (found.rows, found.pictures, len(found.good)) == (9673, 1000, 9673)


class Given:
    """Rows given as (picture, usable); pictures below 0 cannot be opened."""

    name = "given"

    def __init__(self, rows: list[tuple[int, bool]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, row: int) -> Record:
        if not self.rows[row][1]:
            raise RowError("unusable")
        return Record(row, str(self.rows[row][0]), "what?", False, (), "")

    def image(self, row: int) -> Any:
        if self.rows[row][0] < 0:
            raise RowError("no picture")
        return np.zeros((4, 4, 3), np.uint8)


@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans())))
def test_good_rows_are_those_with_text_and_picture(rows: list[tuple[int, bool]]) -> None:
    found = check(Given(rows), str)
    assert found.good.tolist() == [i for i, (picture, usable) in enumerate(rows) if usable and picture >= 0]
    assert sorted([*found.good.tolist(), *(bad.row for bad in found.bad)]) == list(range(len(rows)))
    assert found.pictures == len({picture for picture, usable in rows if usable})
