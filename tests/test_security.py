"""What SECURITY.md promises of the code: nothing in it unpickles, evaluates, or runs what files of strangers say."""

from __future__ import annotations

import ast
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TESTS

ROOT = TESTS.parent
SOURCES = sorted(path for room in ("pgfast", "export", "train", "bench") for path in (ROOT / room).rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "torch.hub.load", "yaml.load"}
TRUSTED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
"""Calls that are safe with one keyword only."""
FORBIDDEN = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False}


def name_of(node: ast.expr) -> str:
    """`os.system` of the call's function; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := name_of(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def findings(source: str) -> Iterator[str]:
    """Lines that break a rule."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] in UNPICKLERS:
                yield f"line {node.lineno}: imports {name}"  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            called = name_of(node.func)
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            if called in CALLS:
                yield f"line {node.lineno}: calls {called}"
            if called in TRUSTED and given.get(TRUSTED[called][0]) is not TRUSTED[called][1]:
                yield f"line {node.lineno}: calls {called} without {TRUSTED[called][0]}={TRUSTED[called][1]}"
            for word in node.keywords:
                # a variable could be anything: only the safe constant passes
                if word.arg in FORBIDDEN and getattr(word.value, "value", None) is not (not FORBIDDEN[word.arg]):
                    yield f"line {node.lineno}: {word.arg} is not {not FORBIDDEN[word.arg]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_or_evaluates(path: Path) -> None:
    assert list(findings(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "import dill.source",
        "from marshal import loads",
        "x = eval('1')",
        "import os\nos.system('ls')",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=trust)",
        "subprocess.run('ls', shell=True)",
        "tempfile.mktemp()",
    ],
)
def test_the_rules_find_what_they_are_for(planted: str) -> None:
    assert list(findings(planted))


def test_the_rules_let_the_safe_forms_pass() -> None:
    safe = (
        "torch.load('x', weights_only=True)",
        "np.load('x', allow_pickle=False)",
        "run(['ls'])",
        "model.eval()",
        "re.compile('x')",
    )
    assert list(findings("\n".join(safe))) == []


def test_unfinished_folders_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export's folder is readable by its user alone until it is whole; then it has the rights that a new folder has."""
    from pgfast.export.build import export
    from pgfast.export.plan import ExportOptions

    modes = []
    make = tempfile.mkdtemp

    def noted(*words: object, **named: object) -> str:
        folder = make(*words, **named)  # type: ignore[call-overload]
        modes.append(stat.S_IMODE(os.stat(folder).st_mode))
        return str(folder)

    monkeypatch.setattr(tempfile, "mkdtemp", noted)
    export(str(TESTS / "demo_checkpoint"), tmp_path / "out", ExportOptions())
    assert modes
    assert set(modes) == {0o700}
    (tmp_path / "new").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "new").stat().st_mode
