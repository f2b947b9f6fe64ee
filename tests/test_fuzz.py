"""The fuzz targets: their corpus passes, a minute of fuzzing finds nothing, and a fault would be found."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TESTS

ROOT = TESTS.parent
TARGETS = ("pictures", "manifest", "graphs", "locations")
SECONDS = 14
"""For each of the four."""
needs_atheris = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
PLANTED = """
import atheris, sys
def check(data):
    if data[:1] == b"p" and data[1:2] == b"g":
        raise ValueError("planted")
atheris.Setup(sys.argv, atheris.instrument_func(check))
atheris.Fuzz()
"""


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_passes(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    check = importlib.import_module(f"fuzz.{target}").check
    files = sorted((ROOT / "fuzz" / "corpus" / target).iterdir())
    assert files
    for path in files:
        check(path.read_bytes())


@needs_atheris
def test_a_minute_of_fuzzing_finds_nothing() -> None:
    command = [sys.executable, "-m", "fuzz.run", "--seconds", str(SECONDS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    executions = re.findall(r"^(\w+) +executions (\d+)", done.stdout, re.MULTILINE)
    assert tuple(name for name, _ in executions) == TARGETS
    assert all(int(count) > 100 for _, count in executions), done.stdout


@needs_atheris
def test_a_planted_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    run = importlib.import_module("fuzz.run")
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    (tmp_path / "found").mkdir()
    (tmp_path / "corpus" / "planted").mkdir(parents=True)
    monkeypatch.setattr(run, "FINDINGS", tmp_path)
    monkeypatch.setattr(run, "CORPUS", tmp_path / "corpus")
    prefix = f"-artifact_prefix={tmp_path}/planted-"
    monkeypatch.setattr(run, "command", lambda target, *words: [sys.executable, str(script), prefix, *map(str, words)])
    assert run.run("planted", 60, tmp_path / "found")["findings"] == 1
    assert [path.read_bytes()[:2] for path in tmp_path.glob("planted-crash-*")] == [b"pg"]


@needs_atheris
def test_what_reaches_new_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(ROOT)
    run = importlib.import_module("fuzz.run")
    corpus, found = tmp_path / "corpus" / "locations", tmp_path / "found"
    corpus.mkdir(parents=True)
    found.mkdir()
    (corpus / "old").write_bytes(b"cat")
    (found / "same").write_bytes(b"cat")
    (found / "new").write_bytes(b"<loc0001><loc0002><loc0300><loc0400> cat ; <loc0001> dog")
    monkeypatch.setattr(run, "CORPUS", tmp_path / "corpus")
    run.keep("locations", found)
    assert sorted(path.read_bytes() for path in corpus.iterdir()) == sorted(
        [b"cat", b"<loc0001><loc0002><loc0300><loc0400> cat ; <loc0001> dog"]
    )
    monkeypatch.setattr(run, "MOST_BYTES", 10)
    (found / "large").write_bytes(bytes(range(256)))
    run.keep("locations", found)
    assert len(list(corpus.iterdir())) == 2
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run, "CORPUS", tmp_path / "corpus")
    run.keep("locations", found)
    assert bytes(range(256)) in [path.read_bytes() for path in corpus.iterdir()]
