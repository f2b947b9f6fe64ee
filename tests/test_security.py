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
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "torch.hub.load"}
CALLS |= {"yaml.load", "yaml.unsafe_load", "pandas.read_pickle", "runpy.run_path", "subprocess.getoutput"}
TRUSTED = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
}
"""Calls that are safe with one keyword only."""
FORBIDDEN = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False}


def imported(tree: ast.Module) -> dict[str, str]:
    """What names of modules and of their members stand for."""
    found = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            if isinstance(node, ast.ImportFrom):
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif alias.asname:
                found[alias.asname] = alias.name
    return found


def name_of(node: ast.expr, names: dict[str, str]) -> str:
    """`os.system` of the call's function; empty for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := name_of(node.value, names)):
        return f"{owner}.{node.attr}"
    return ""


def findings(source: str) -> Iterator[str]:
    """Lines that break a rule."""
    tree = ast.parse(source)
    aliases = imported(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] in UNPICKLERS:
                yield f"line {node.lineno}: imports {name}"  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            called = name_of(node.func, aliases)
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
        "from os import system\nsystem('ls')",
        "from torch import load\nload('x')",
        "from numpy import load as read\nread('x')",
        "import yaml as y\ny.load('x')",
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


@pytest.fixture(params=[0o022, 0o077], ids=["umask022", "umask077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rights of the temporary folders that were made."""
    found: list[int] = []
    make = tempfile.mkdtemp

    def noted(*words: object, **named: object) -> str:
        folder = make(*words, **named)  # type: ignore[call-overload]
        found.append(stat.S_IMODE(os.stat(folder).st_mode))
        return str(folder)

    monkeypatch.setattr(tempfile, "mkdtemp", noted)
    return found


def check_rights(out: Path, modes: list[int], umask: int) -> None:
    """A folder is readable by its user alone until it is whole; then it has the rights that the user gives new folders."""
    assert modes
    assert set(modes) == {0o700}
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask for path in out.iterdir())
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_an_unfinished_export_is_private(tmp_path: Path, modes: list[int], umask: int) -> None:
    from pgfast.export.build import export
    from pgfast.export.plan import ExportOptions

    export(str(TESTS / "demo_checkpoint"), tmp_path / "out", ExportOptions())
    check_rights(tmp_path / "out", modes, umask)


def test_an_unfinished_report_of_an_evaluation_is_private(tmp_path: Path, modes: list[int], umask: int) -> None:
    from pgfast.train.evaluation.report import _appears_whole

    with _appears_whole(tmp_path / "out") as folder:
        (folder / "questions.jsonl").write_text("{}")
        with pytest.raises(FileNotFoundError):
            (tmp_path / "out").stat()
    check_rights(tmp_path / "out", modes, umask)


def test_a_picture_is_not_written_through_a_link_at_its_temporary_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that others write to; the name is random, and here they know it."""
    from PIL import Image

    from pgfast.drawing import save_picture
    from pgfast.errors import InputError

    monkeypatch.setattr("secrets.token_hex", lambda size: "known")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".pgfast-known.partial").symlink_to(victim)
    with pytest.raises(InputError, match="cannot be written"):
        save_picture(Image.new("RGB", (4, 4)), tmp_path / "out.png")
    assert victim.read_text() == "precious"
