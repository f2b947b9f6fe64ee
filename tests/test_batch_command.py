"""`pgfast batch` as a user meets it: answers, refusals, progress."""

from __future__ import annotations

import csv
import json
import os
import pty
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from batch_data import QUESTIONS, command, lines_of, make_rows, run, whole_outputs

import pgfast
from pgfast.batch import cli_progress
from pgfast.batch.journal import Journal
from pgfast.cli import main
from pgfast.loading import demo_bundle

BLUE = demo_bundle().parent / "blue_circle.png"
ROWS = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return whole_outputs(data, tmp_path_factory.mktemp("whole"))


def called(*args: Any) -> int | str | None:
    """Run the command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(["batch", *map(str, args)])
    return caught.value.code


def test_every_row_becomes_a_line_with_its_answer(data: Path, whole: dict[str, bytes]) -> None:
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in whole["jsonl"].splitlines()]
    cells = list(csv.DictReader(whole["csv"].decode().splitlines(keepends=True)))
    assert [line["row"] for line in lines] == list(range(ROWS))
    with pgfast.load(provider="cpu") as engine:
        for row, line, cell in zip(rows, lines, cells, strict=True):
            assert (line["id"], line["image"], line["question"]) == (row["id"], row["image"], row["question"])
            assert (cell["id"], cell["question"]) == (row["id"], row["question"])
            if row["image"] == "gone.png":
                assert line["text"] is None
                assert line["error"] == {"code": "image_error", "message": f"{data}/gone.png does not exist"}
                assert (cell["error_code"], cell["text"]) == ("image_error", "")
                continue
            expected = engine.answer(data / row["image"], row["question"])
            assert (line["text"], line["finish_reason"], line["error"]) == (expected.text, expected.finish_reason, None)
            assert line["confidence"] == pytest.approx(expected.confidence, rel=1e-4)
            assert (cell["text"], float(cell["confidence"])) == (line["text"], line["confidence"])


def test_csv_in_gives_the_same_answers(data: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    assert run(data / "rows.csv", tmp_path / "out.jsonl").returncode == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole["jsonl"]


def test_a_finished_run_says_so_and_does_nothing(
    data: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    assert called(data / "rows.jsonl", out) == 1
    before = out.stat()
    capsys.readouterr()
    monkeypatch.setattr(pgfast, "load", None)
    assert called(data / "rows.jsonl", out, "--json") == 1
    text, error = capsys.readouterr()
    assert error.splitlines() == [
        f"pgfast: {out} is complete already",
        f"pgfast: {out} has {ROWS} rows, {ROWS // 10} of them errors",
    ]
    summary = json.loads(text)
    del summary["seconds"]
    assert summary == {"rows": ROWS, "errors": ROWS // 10, "finished": True, "answered_now": 0}
    after = out.stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)


def refusal(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """The one line with which the command exits with 2."""
    capsys.readouterr()
    assert called(*args) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1 or error.startswith("Usage:"), error
    return error


def test_other_values_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    (tmp_path / "000.png").write_bytes((data / "000.png").read_bytes())
    rows.write_text('{"image": "000.png"}\n')
    first = (rows, out, "--question", "red?")
    assert called(*first) == 0
    for args, message in (
        ((rows, out, "--question", "blue?"), 'options question was "red?" and is "blue?"'),
        ((*first, "--language", "de"), "options language"),
        ((*first, "--max-new-tokens", "1"), "options max_new_tokens"),
        ((*first, "--timings"), "options timings"),
        ((rows, out, "--prompt", "red?"), "options prompt"),
    ):
        assert f"{out} holds another run: {message}" in refusal(capsys, *args)
    other = Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))
    manifest = (other / "pgfast.json").read_text()
    (other / "pgfast.json").write_text(manifest.replace("answer {language} {text}", "answer {text} {language}"))
    assert "bundle template" in refusal(capsys, *first, "-m", other)
    rows.write_text('{"image": "000.png"} \n')
    assert "input sha256" in refusal(capsys, *first)
    rows.write_text('{"image": "000.png"}\n')
    assert called(*first) == 0


def test_two_processes_do_not_share_an_out(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    with Journal(out, {"input": None}):
        assert "in use: another process" in refusal(capsys, data / "rows.jsonl", out)
    assert called(data / "rows.jsonl", out) == 1


def test_usage_errors(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = data / "rows.jsonl", tmp_path / "out.jsonl"
    for args, message in (
        ((rows, out, "--question", "a", "--prompt", "b"), "--question or --prompt, not both"),
        ((rows, out, "--question", " "), "question is empty"),
        ((rows, tmp_path / "out.txt"), "should end with .jsonl or .csv"),
        ((rows, tmp_path / "gone" / "out.csv"), "No such file"),
        ((tmp_path / "gone.jsonl", out), "No such file"),
        ((data, out), "--question or --prompt"),
        ((rows, rows), "is IN"),
        ((rows, out, "--temperature", "-1"), "temperature"),
        ((rows, out, "-m", tmp_path), "is not a bundle"),
        ((rows, out, "--max-errors", "0"), "--max-errors"),
        ((rows,), "Missing argument 'OUT'"),
    ):
        assert message in refusal(capsys, *args)
    assert list(tmp_path.iterdir()) == []
    assert rows.stat().st_size > 0


def test_too_many_errors_stop_it(
    data: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    for most, lines in ((2, 18), (2, 18), (3, 28)):
        assert called(data / "rows.jsonl", out, "--max-errors", most) == 1
        assert f"{lines} rows, {most} of them errors; it stopped there" in capsys.readouterr().err
        assert lines_of(out) == lines
    assert called(data / "rows.jsonl", out) == 1
    assert out.read_bytes() == whole["jsonl"]


def test_a_folder_with_one_question(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data, tmp_path / "in")
    assert called(tmp_path / "in", tmp_path / "in" / "out.csv", "--question", QUESTIONS[0]) == 0
    rows = list(csv.DictReader((tmp_path / "in" / "out.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == [f"{number:03}.png" for number in range(ROWS // 4)]
    assert all(row["text"] and row["question"] == QUESTIONS[0] for row in rows)
    assert called(tmp_path / "in", tmp_path / "in" / "out.csv", "--question", QUESTIONS[0]) == 0  # OUT is no picture
    shutil.copy(BLUE, tmp_path / "in" / "new.png")
    assert "input sha256" in refusal(capsys, tmp_path / "in", tmp_path / "in" / "out.csv", "--question", QUESTIONS[0])


def test_rows_from_stdin(data: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    text, out = (data / "rows.jsonl").read_text(), tmp_path / "out.jsonl"
    done = run("-", out, input=text, cwd=data)
    assert done.returncode == 1
    assert out.read_bytes() == whole["jsonl"].replace(f"{data}/gone.png".encode(), b"gone.png")
    assert "cannot be read again" in run("-", out, input=text, cwd=data).stderr


def test_nothing_in_gives_nothing_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").touch()
    assert called(tmp_path / "rows.jsonl", tmp_path / "out.csv") == 0
    assert (tmp_path / "out.csv").read_text().count("\n") == 1
    assert "has 0 rows, 0 of them errors" in capsys.readouterr().err


def test_keys_that_nobody_reads_are_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"image": str(BLUE), "question": "red?", "choises": ["a"], "answers": []}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert called(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", "--timings") == 0
    assert "passed over: answers, choises\n" in capsys.readouterr().err
    (line,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert set(line["timings"]) == {"preprocess", "vision", "prefill", "decode", "ttft", "total"}
    assert min(line["timings"].values()) >= 0
    assert line["timings"]["vision"] > 0


def test_lines_now_and_then_without_a_terminal(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(cli_progress, "_SECONDS_BETWEEN_LOOKS", 0.0)
    assert called(data / "rows.jsonl", tmp_path / "out.jsonl") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if " left, " in line]
    assert len(lines) == ROWS
    assert lines[99].startswith("pgfast: 100 of 120 rows, ")
    assert lines[99].endswith("left, 10 errors")
    assert "0:00:00 left" in lines[-1]


def test_a_bar_on_a_terminal(data: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(command(data / "rows.jsonl", tmp_path / "out.jsonl"), stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 1
    assert "━".encode() in shown
    assert b" of 120 rows, " in shown
    assert b"/s, 0:00:" in shown


def test_an_interrupt_right_behind_a_row_counts_that_row(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, write = tmp_path / "out.jsonl", Journal._write

    def write_then_interrupt(journal: Journal, result: Any) -> None:
        write(journal, result)
        if journal.rows == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "_write", write_then_interrupt)
    assert called(data / "rows.jsonl", out) == 130
    assert f"7 rows are in {out}; the same command goes on" in capsys.readouterr().err
    assert lines_of(out) == 7
