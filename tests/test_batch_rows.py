"""Rows of files and folders: what is in them, what is wrong with them, and that nothing is lost on the way."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgfast.batch import sources
from pgfast.batch.rows import Defaults, Row, to_row
from pgfast.batch.sources import open_source
from pgfast.errors import InputError

PICTURE = Path(sources.__file__).parent.parent / "demo" / "blue_circle.png"


def written(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def read(path: str, defaults: Defaults | None = None) -> list[Row]:
    return list(open_source(path, defaults).rows())


def test_a_jsonl_row_says_what_it_says(tmp_path: Path) -> None:
    lines = [
        {"image": "a/b.jpg", "question": "what?", "id": 7, "choices": ["yes", "no"], "language": "de", "answers": ["x"]},
        {"image": "/abs.png", "prompt": "caption en", "id": "q"},
        {"image": "c.png"},
    ]
    text = "\ufeff" + "\n".join(json.dumps(line) for line in lines[:2]) + "\n\n  \n" + json.dumps(lines[2])
    source = open_source(written(tmp_path / "in.jsonl", text), Defaults(question="red?", language="fr"))
    one, two, three = source.rows()
    assert one == Row(0, 7, "a/b.jpg", f"{tmp_path}/a/b.jpg", False, "what?", None, ("yes", "no"), "de")
    assert two == Row(1, "q", "/abs.png", "/abs.png", False, None, "caption en", None, "fr")
    assert three == Row(2, None, "c.png", f"{tmp_path}/c.png", False, "red?", None, None, "fr")
    assert source.ignored == {"answers"}


def test_a_picture_may_be_inside_its_row() -> None:
    text = base64.b64encode(PICTURE.read_bytes()).decode()
    for given_as in (text, f"data:image/png;base64,{text}", "data:,nothing"):
        row = to_row(0, {"image": given_as, "question": "?"}, "/folder", Defaults())
        assert (row.image, row.picture, row.embedded) == (None, given_as, True)
    for path in ("/9j/photos/of/a/long/summer/at/the/sea/with/friends/and/family/number/one.jpg", "R0lGOD", "iVBORw0KGgo/x"):
        row = to_row(0, {"image": path, "question": "?"}, "", Defaults())
        assert (row.image, row.picture, row.embedded) == (path, path, False)


BAD_LINES = {
    b"nonsense": "not JSON: Expecting value at character 0",
    b'{"image": "a.png"': "not JSON",
    b'{"image": "a.png", "question": NaN}': "NaN is not a JSON number",
    b"[" * 100_000: "not JSON",
    b'{"image": "a.png", "question": "\xff"}': "not UTF-8",
    b"\x00\x00": "not JSON",
    b"[1]": "not an object",
    b'{"question": "?"}': "no image",
    b'{"image": "", "question": "?"}': "no image",
    b'{"image": 5, "question": "?"}': "image is not a text",
    b'{"image": "a.png"}': "neither question nor prompt",
    b'{"image": "a.png", "question": "?", "prompt": "p"}': "both question and prompt",
    b'{"image": "a.png", "question": ["?"]}': "question is not a text",
    b'{"image": "a.png", "question": "?", "choices": "yes"}': "choices is not a list",
    b'{"image": "a.png", "question": "?", "choices": [1]}': "choices is not a list",
    b'{"image": "a.png", "question": "?", "id": true}': "id is neither",
    b'{"image": "a.png", "question": "?", "id": 1.5}': "id is neither",
    b'{"image": "a.png", "question": "?", "language": 1}': "language is not a text",
    b'{"image": "a.png", "question": "?", "id": ' + b"9" * 5000 + b"}": "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40].decode(errors="replace"))
def test_a_bad_line_is_an_error_row_and_the_next_is_read(line: bytes, tmp_path: Path) -> None:
    bad, good = read(written(tmp_path / "in.jsonl", line + b'\n{"image": "a.png", "question": "?"}\n'))
    assert bad.error is not None
    assert bad.error.code == "row_error"
    assert BAD_LINES[line] in bad.error.message
    assert (bad.number, good.number, good.error) == (0, 1, None)


def test_an_error_row_says_which_one_it_is() -> None:
    row = to_row(3, {"image": "a.png", "id": 9, "question": "?", "choices": 1}, "", Defaults())
    assert (row.number, row.id, row.image, row.question) == (3, 9, "a.png", "?")


CELL = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\r"), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CELL, CELL, CELL), max_size=6), st.booleans(), st.booleans())
def test_csv_is_read_as_it_was_written(tmp_path_factory: Any, cells: list[tuple[str, ...]], bom: bool, crlf: bool) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n" if crlf else "\n")
    writer.writerow(["id", "image", "question"])
    writer.writerows(cells)
    path = tmp_path_factory.getbasetemp() / "in.csv"
    source = open_source(written(path, ("\ufeff" if bom else "") + text.getvalue()))
    rows = list(source.rows())
    assert [row.number for row in rows] == list(range(len(cells)))
    for row, (id_, image, question) in zip(rows, cells, strict=True):
        assert row.id == (id_ or None)
        if image and question and not image.startswith("data:"):
            assert (row.image, row.question, row.error) == (image, question, None)
        elif not image or not question:
            assert row.error is not None
    for skip in range(len(cells) + 1):
        assert list(source.rows(skip)) == rows[skip:]


def test_csv_by_hand(tmp_path: Path) -> None:
    text = (
        'question ,image,choices,note\n"a ""big"",\nred one?",x.png,yes | no,n\nis it 5" wide?,y.png,,\n\n,z.png,,\n'
        "too,few\nné?,\udce9.png,,".encode("utf-8", "surrogateescape")
    )
    source = open_source(written(tmp_path / "in.csv", text), Defaults(prompt="caption"))
    one, two, three, four, five = source.rows()
    assert (one.question, one.image, one.choices) == ('a "big",\nred one?', "x.png", ("yes", "no"))
    assert (two.question, two.choices, two.prompt) == ('is it 5" wide?', None, None)
    assert (three.question, three.prompt) == (None, "caption")
    assert four.error is not None
    assert "2 cells, the header 4" in four.error.message
    assert os.fsencode(five.picture) == os.fsencode(tmp_path) + b"/\xe9.png"  # a name need not be UTF-8
    assert source.ignored == {"note"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no header"),
        ("picture,question\n", "no column 'image'"),
        ("image,question,image\n", "the column 'image' twice"),
        ("image;question\n", "no column 'image'"),
    ],
)
def test_a_csv_header_is_needed(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        open_source(written(tmp_path / "in.csv", text))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_huge_row_is_an_error_row_and_is_never_held(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(sources, "_BLOCK", 1000)
    good = '{"image": "a.png", "question": "?"}' if kind == "jsonl" else "a.png,?"
    header = "" if kind == "jsonl" else "image,question\n"
    huge = '"' + "x" * 10_000_000 + '"'
    row = huge if kind == "jsonl" else f"a.png,{huge}"
    source = open_source(written(tmp_path / f"in.{kind}", f"{header}{good}\n{row}\n{good}\n{row}"))
    tracemalloc.start()
    rows = list(source.rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.error is None for row in rows] == [True, False, True, False]
    assert rows[1].error is not None
    assert "more than 1,000 bytes" in rows[1].error.message
    assert peak < 1_000_000


def test_a_quote_that_never_ends_costs_its_rows_and_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 200_000)
    csv.field_size_limit(131_072)  # the module's own; it is only ever raised
    text = 'image,question\na.png,"what?\n' + "b.png,?\n" * 30_000
    tracemalloc.start()
    bad = sum(row.error is not None for row in open_source(written(tmp_path / "in.csv", text)).rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bad == 1
    assert peak < 3_000_000
    short = read(written(tmp_path / "in.csv", 'image,question\na.png,"what?\nb.png,?\n'))
    assert [row.error.message for row in short if row.error] == ["the row is not CSV: unexpected end of data"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_are_read_one_by_one(kind: str, tmp_path: Path) -> None:
    line = '{"image": "a.png", "question": "what color is the shape?"}\n' if kind == "jsonl" else "a.png,what color?\n"
    source = open_source(written(tmp_path / f"in.{kind}", ("image,question\n" if kind == "csv" else "") + line * 20_000))
    tracemalloc.start()
    assert source.survey().rows == 20_000
    assert sum(1 for _ in source.rows(10)) == 19_990
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22  # the buffer of a file and a row


def test_a_survey_hashes_the_file(tmp_path: Path) -> None:
    text = b'{"image": "a"}\n{"image": "b"}'
    survey = open_source(written(tmp_path / "in.jsonl", text)).survey()
    assert (survey.sha256, survey.rows) == (hashlib.sha256(text).hexdigest(), 2)
    assert open_source(written(tmp_path / "empty.jsonl", b"")).survey().rows == 0
    assert read(str(tmp_path / "empty.jsonl")) == []
    assert open_source(written(tmp_path / "empty.csv", b"image,question\n")).survey().rows == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures and other things, three folders deep."""
    top = tmp_path / "pictures"
    for name in ("b.png", "a.JPG", "sub/z.webp", "sub/deep/y.png", "c/x.png", "notes.txt", ".hidden.png", ".cache/w.png"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(b"x")
    return top


def test_a_folder_is_its_pictures_by_name(folder: Path) -> None:
    rows = read(str(folder), Defaults(question="red?", language="de"))
    assert [row.image for row in rows] == ["a.JPG", "b.png", "c/x.png", "sub/deep/y.png", "sub/z.webp"]
    assert rows[3] == Row(3, None, "sub/deep/y.png", f"{folder}/sub/deep/y.png", False, "red?", None, None, "de")
    assert list(open_source(str(folder), Defaults(question="red?", language="de")).rows(2)) == rows[2:]


def test_links_pipes_and_odd_names_in_a_folder(folder: Path) -> None:
    os.symlink(folder, folder / "sub" / "loop")
    os.symlink(folder / "sub", folder / "loop.png")
    os.symlink("nowhere.png", folder / "broken.png")
    os.symlink("self.png", folder / "self.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "data:,x").mkdir()
    (folder / "data:,x" / "1.png").write_bytes(b"x")
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png"))).write_bytes(b"x")
    source = open_source(str(folder), Defaults(prompt="p"))
    rows = list(source.rows())
    assert len(rows) == source.survey().rows == 11
    assert {"loop.png", "broken.png", "self.png", "pipe.png", "data:,x/1.png", "\udcff.png"} < {row.image for row in rows}
    assert not any(row.embedded for row in rows)


def test_a_folder_changes_its_hash_with_names_and_sizes(folder: Path) -> None:
    def digest() -> str | None:
        return open_source(str(folder), Defaults(question="?")).survey().sha256

    seen = {digest()}
    (folder / "notes.txt").write_bytes(b"longer")
    assert digest() in seen
    (folder / "b.png").write_bytes(b"xx")
    seen.add(digest())
    (folder / "b.png").rename(folder / "bb.png")
    seen.add(digest())
    (folder / "sub" / "z.webp").rename(folder / "c" / "z.webp")
    seen.add(digest())
    assert len(seen) == 4


def test_inputs_that_are_none(tmp_path: Path, folder: Path) -> None:
    for path, message in (
        (str(tmp_path / "gone.jsonl"), "No such file"),
        (str(tmp_path / "gone.csv"), "No such file"),
        (str(tmp_path / "gone"), "is no input"),
        (str(PICTURE), "is no input"),
        ("a\0.jsonl", "null byte"),
        (str(folder), "--question or --prompt"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        open_source(str(tmp_path / "nothing"), Defaults(question="?")).survey()
