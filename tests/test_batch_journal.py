"""The journal: whole lines count, torn ones do not, and no run continues another."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgfast.batch.journal import Journal
from pgfast.batch.rows import Failure, Result, Row
from pgfast.errors import InputError, PgfastError
from pgfast.types import Answer, Timings

RUN: dict[str, Any] = {"input": {"kind": "jsonl", "sha256": "a"}, "bundle": "b", "options": {"seed": None, "stop": ("x",)}}
KINDS = pytest.mark.parametrize("kind", ["jsonl", "csv"])


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test looks at files through the same page cache that a kill leaves behind."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def answered(number: int, text: str, **row: Any) -> Result:
    choices = {text: 0.75, 'no, "never"\n': 0.25} if number % 2 else None
    timings = Timings(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    return Result(Row(number, question=text, **row), Answer(text, 1e-7 / 3, (1,), (-1.5,), "stop", choices, timings))


def refused(number: int, message: str, **row: Any) -> Result:
    return Result(Row(number, prompt=message, **row), error=Failure("row_error", message))


RESULTS = [
    answered(0, 'a "quoted"\n, text', id="x,\ny", image="é\u2028.png"),
    refused(1, '"error": {"code"\n,,\n', id=5),
    answered(2, '", "error": {', image='"error": {,,\n'),
    answered(3, "\r\n,,\r\n", id='"'),
    refused(4, "half \udcff a \0 character"),
    answered(5, "plain"),
]


def write(path: Path, results: list[Result], **options: Any) -> list[int]:
    """Write a whole run; returns where each result ends in the file."""
    ends = []
    with Journal(path, RUN, **options) as journal:
        for result in results:
            journal.append(result)
            ends.append(path.stat().st_size)
        journal.finish()
    return ends


@KINDS
def test_a_line_torn_at_any_byte_is_written_anew(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{kind}"
    ends = write(path, RESULTS)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path, RUN) as journal:
            there = sum(end <= cut for end in ends)
            assert (journal.rows, journal.finished) == (there, False), whole[:cut]
            assert journal.errors == sum(result.error is not None for result in RESULTS[:there])
            for result in RESULTS[there:]:
                journal.append(result)
        assert path.read_bytes() == whole


TEXT = st.text(st.sampled_from('"\n\r, {}:|é\0\\\udc80error') | st.characters(), max_size=12)


@KINDS
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_text_survives_a_tear_and_is_read_back(
    kind: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    path.unlink(missing_ok=True)
    makers = st.sampled_from([answered, refused])
    results = [data.draw(makers)(n, data.draw(TEXT), id=data.draw(TEXT), image=data.draw(TEXT)) for n in range(3)]
    ends = write(path, results)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:cut])
    with Journal(path, RUN) as journal:
        assert journal.rows == sum(end <= cut for end in ends)
        for result in results[journal.rows :]:
            journal.append(result)
    assert path.read_bytes() == whole
    if kind == "jsonl":
        lines = whole.decode().split("\n")
        assert lines.pop() == ""
        assert [json.loads(line) for line in lines] == [result.record() for result in results]
        return
    rows = list(csv.DictReader(io.StringIO(whole.decode(), newline="")))
    for row, result in zip(rows, results, strict=True):
        text = result.error.message if result.error else result.answer and result.answer.text
        assert text is not None
        assert row["error_message" if result.error else "text"] == text.encode("utf-8", "backslashreplace").decode()
        assert row["row"] == str(result.row.number)


def test_all_lines_have_the_same_keys(tmp_path: Path) -> None:
    for timings in (False, True):
        path = tmp_path / f"{timings}.jsonl"
        write(path, RESULTS, timings=timings)
        keys = {tuple(json.loads(line)) for line in path.read_bytes().splitlines()}
        last = ("choices", "calibrated", "unsure_of", *(("timings", "error") if timings else ("error",)))
        assert keys == {("row", "id", "image", "question", "prompt", "text", "confidence", "finish_reason", *last)}


def test_csv_cells(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write(path, [answered(0, "red", id=3), answered(1, "yes"), refused(2, "no")], timings=True)
    one, two, three = csv.DictReader(io.StringIO(path.read_bytes().decode(), newline=""))
    assert (one["id"], one["text"], one["confidence"], one["choices"], one["seconds_vision"]) == (
        *("3", "red", repr(1e-7 / 3), "", "0.2"),
    )
    assert json.loads(two["choices"]) == {"yes": 0.75, 'no, "never"\n': 0.25}
    assert (three["error_code"], three["error_message"], three["seconds_total"], three["prompt"]) == (
        "row_error",
        "no",
        "",
        "no",
    )


@KINDS
def test_a_finished_run_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{kind}"
    write(path, RESULTS)
    whole = path.read_bytes()
    with Journal(path, RUN) as journal:
        assert (journal.finished, journal.rows, journal.errors) == (True, 6, 2)
    path.write_bytes(whole[:-1])  # somebody cut it: no longer finished
    with Journal(path, RUN) as journal:
        assert (journal.finished, journal.rows) == (False, 5)
    assert write(path, [])[-1:] == []
    path.unlink()  # somebody wants it anew
    with Journal(path, RUN | {"bundle": "c"}) as journal:
        assert (journal.finished, journal.rows) == (False, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "c"}, 'bundle was "b" and is "c"'),
        ({"input": {"kind": "jsonl", "sha256": "z"}}, 'input sha256 was "a" and is "z"'),
        ({"options": {"seed": 1, "stop": ("x",)}}, "options seed was null and is 1"),
        ({"options": {"seed": None, "stop": ("x",), "new": 1}}, "options new was null and is 1"),
        ({"input": None}, "rows from stdin cannot be read again"),
    ],
)
def test_another_run_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(path, RUN) as journal:
        journal.append(RESULTS[0])
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        Journal(path, RUN | change)
    assert path.read_bytes() == before
    with Journal(path, RUN) as journal:
        assert journal.rows == 1


def test_what_is_no_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine.csv"
    mine.write_text("my own,file\n")
    with pytest.raises(InputError, match="not as a run's results"):
        Journal(mine, RUN)
    assert mine.read_text() == "my own,file\n"
    for damage in ("", "{", "[]", '{"format": 2}', '{"format": 2, "run": {}, "finished": {"rows": null}}'):
        (tmp_path / "mine.csv.run.json").write_text(damage)
        with pytest.raises(InputError, match="is damaged"):
            Journal(mine, RUN)
    (tmp_path / "mine.csv.run.json").write_text('{"format": 3, "run": {}, "finished": null}')
    with pytest.raises(InputError, match="another version"):
        Journal(mine, RUN)
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    for name, message in {
        "out.txt": "should end with",
        "out": "should end with",
        "gone/out.csv": "No such file",
        "pipe.csv": "is not a file",
        "folder.csv": "Is a directory",
        "a\0.csv": "null byte",
    }.items():
        with pytest.raises(InputError, match=message):
            Journal(tmp_path / name, RUN)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    code = f"from pgfast.batch.journal import Journal\nJournal({str(path)!r}, {RUN!r})\nprint('open', flush=True)\ninput()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(InputError, match="in use: another process"):
            Journal(path, RUN)
    finally:
        holder.kill()
        holder.communicate()
    with Journal(path, RUN):  # a killed process holds nothing
        pass


@KINDS
def test_an_empty_run(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{kind}"
    write(path, [])
    with Journal(path, RUN) as journal:
        assert journal.rows == 0
    assert len(path.read_text().splitlines()) == (kind == "csv")


def test_a_failed_write_says_what_to_do_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.csv"
    room, real = 300, os.write

    def full(file: int, data: Any) -> int:
        left = room - os.fstat(file).st_size
        if left <= 0:
            raise OSError(28, "No space left on device")
        return real(file, data[:left])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(PgfastError, match=r"No space left on device; .*run the same command"):
        write(path, RESULTS)
    monkeypatch.undo()
    assert path.stat().st_size == room
    with Journal(path, RUN) as journal:
        assert 0 < journal.rows < len(RESULTS)
        for result in RESULTS[journal.rows :]:
            journal.append(result)
    write(tmp_path / "other.csv", RESULTS)
    assert path.read_bytes() == (tmp_path / "other.csv").read_bytes()


def test_results_come_in_order(tmp_path: Path) -> None:
    with Journal(tmp_path / "out.jsonl", RUN) as journal:
        journal.append(RESULTS[0])
        for wrong in (RESULTS[0], RESULTS[2]):
            with pytest.raises(AssertionError, match="row 1 comes next"):
                journal.append(wrong)
