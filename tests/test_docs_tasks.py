"""docs/tasks.md: every row of the demo model's table is run, and prints what the table says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import TESTS
from PIL import Image

from pgfast.cli import cli

ROOT = TESTS.parent
DOCUMENT = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
ROWS = re.findall(r"^\| [^|]* \| `(pgfast [^`]*)` \| ([^|]*) \|$", DOCUMENT, re.MULTILINE)


def test_the_table_has_every_task_that_the_demo_model_knows() -> None:
    assert {shlex.split(command)[1] for command, _ in ROWS} == {"answer", "caption", "detect", "segment"}
    assert len(ROWS) >= 8
    for picture in re.findall(r'src="([^"]+)"', DOCUMENT):
        assert (ROOT / "docs" / picture).is_file()


@pytest.mark.parametrize(("command", "said"), ROWS)
def test_the_demo_model_says_what_the_table_says(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(ROOT / word) if word.startswith("pgfast/demo/") else word for word in shlex.split(command)[1:]]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.stderr
    lines = ["nothing"] if said == "nothing" else re.findall(r"`([^`]*)`", said)
    found = result.stdout.splitlines() or ["nothing"]
    assert [NUMBER.sub("#", line) for line in found] == [NUMBER.sub("#", line) for line in lines]
    numbers = [[float(number) for line in some for number in NUMBER.findall(line)] for some in (found, lines)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.02)  # processors differ in the last digits
    if "-o" in words:
        drawn = words[words.index("-o") + 1]
        with Image.open(tmp_path / drawn) as new, Image.open(ROOT / "docs" / "pictures" / drawn) as shown:
            assert new.size == shown.size
            same = (np.asarray(new.convert("RGB")) == np.asarray(shown.convert("RGB"))).all(axis=2)
        assert same.mean() > 0.95  # letters may be drawn a little differently
