"""`pgfast eval`: what the command prints and writes, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DEMO_CHECKPOINT
from memory_dataset import Memory, easy_slice, one
from pgfast.train.data import sources
from pgfast.train.demo import easy_vqa_data

import pgfast
from pgfast.cli import main
from pgfast.loading import demo_bundle


@pytest.fixture(scope="module")
def easy() -> Memory:
    return easy_slice()


@pytest.fixture
def opened(easy: Memory, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`open_dataset` gives the slice; notes what it was asked for."""
    calls: list[Any] = []

    def open_dataset(spec: str, *, images: Path | None, annotations: Path | None) -> Memory:
        calls.append((spec, images, annotations))
        return easy

    monkeypatch.setattr(sources, "open_dataset", open_dataset)
    return calls


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["eval", *args])
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


def test_the_command_measures_a_bundle(opened: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    args = [str(demo_bundle()), "spec", "--images", "dir", "--annotations", "file.json", "--limit", "60", "--provider", "cpu"]
    code, printed, err = run(capsys, *args, "-o", str(out), "--worst", "3")
    assert code == 0, err
    assert opened == [("spec", Path("dir"), Path("file.json"))]
    lines = printed.splitlines()
    assert lines[0] == "accuracy (official) of easy-VQA, a slice"
    assert re.fullmatch(r"overall +\d+\.\d\d +60", lines[1])
    end = lines.index("")  # the confidence comes next
    assert {line.split("  ")[0] for line in lines[2:end]} == {"yes/no", "other", *easy_vqa_data.KINDS}
    assert "questions 60/60" in err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["model"]["digest"] == pgfast.load(provider="cpu").manifest.digest()
    assert summary["model"]["provider"] == "cpu"
    assert summary["model"]["pgfast"] == pgfast.__version__
    assert f"{100 * summary['overall']['accuracy']:.2f}" in lines[1]
    code, _, err = run(capsys, *args, "-o", str(out))
    assert code == 2
    assert "exists" in err


def test_the_command_measures_a_checkpoint(opened: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    figures = []
    for model in (demo_bundle(), DEMO_CHECKPOINT):
        code, printed, err = run(capsys, str(model), "spec", "--limit", "60", "--json", "--mode", "simple", "--provider", "cpu")
        assert code == 0, err
        figures.append(json.loads(printed))
    for key in ("mode", "overall", "answer_types", "question_types", "questions", "data"):
        assert figures[0][key] == figures[1][key]
    assert figures[0]["mode"] == "simple"
    assert figures[1]["model"]["checkpoint"] == "demo_checkpoint"
    assert figures[1]["model"]["device"] == "cpu"
    assert figures[1]["model"]["dtype"] == "float32"
    assert figures[1]["model"]["template"] == figures[0]["model"]["template"]


def test_the_command_says_what_was_not_scored(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = Memory(
        [one(1, "x", "is there a circle?", ()), one(2, "y\x1b", "a circle?"), one(3, "x", "a circle?", question_type="\x1bis")],
        {"x": np.zeros((8, 8, 3), np.uint8), "y\x1b": "/none\x1b.png"},
    )
    monkeypatch.setattr(sources, "open_dataset", lambda *_, **__: data)
    code, printed, _ = run(capsys, str(demo_bundle()), "spec", "--skip-bad")
    assert code == 0
    assert "1 questions have no reference answer" in printed
    assert "1 rows could not be answered; the first: row 1: /none .png does not exist" in printed
    assert "\x1b" not in printed
    code, printed, err = run(capsys, str(demo_bundle()), "spec")
    assert (code, printed) == (2, "")
    assert "row 1 (question 2) of memory" in err.splitlines()[-1]


def test_errors_of_the_command(opened: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for args, words in (
        ([str(demo_bundle()), "spec", "--adapter", str(adapter)], "is a bundle, which has its adapter"),
        ([str(demo_bundle()), "spec", "--answer-template", "{text}"], "is a bundle, which has its adapter"),
        ([str(adapter), "spec"], "is an adapter: give the checkpoint"),
        ([str(tmp_path / "file"), "spec"], "is a file"),
        ([str(demo_bundle()), "spec", "-o", str(tmp_path / "file")], "exists: choose another folder"),
        ([str(demo_bundle()), "spec", "--provider", "abacus"], "abacus"),
        ([str(demo_bundle()), "spec", "--mode", "exact"], "official"),
    ):
        code, printed, err = run(capsys, *args)
        assert (code, printed) == (2, ""), args
        assert words in err, args


def test_a_bundle_is_measured_without_torch(tmp_path: Path) -> None:
    """From a real data file: none of its readers may need torch either."""
    shutil.copy(demo_bundle().parent / "blue_circle.png", tmp_path / "circle.png")
    row = {"image": "circle.png", "question": "what color is the shape?", "answer": "blue"}
    data = tmp_path / "rows.jsonl"
    data.write_text(2 * (json.dumps(row) + "\n"))
    words = ["eval", str(demo_bundle()), str(data), "--provider", "cpu", "-o", str(tmp_path / "out")]
    # an import of either fails
    code = (
        f"import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from pgfast.cli import main; main({words!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"overall +100.00 +2\n", done.stdout)
    assert (tmp_path / "out" / "errors.html").exists()


def test_a_checkpoint_without_torch_says_what_to_install() -> None:
    code = f"""
import sys
sys.modules["torch"] = None
from pgfast.train.evaluation.transformers_model import load_checkpoint
load_checkpoint({str(DEMO_CHECKPOINT)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'pgfast[train]'" in done.stderr.splitlines()[-1]
