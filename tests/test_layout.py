"""The shape of the project: layers, public names, sizes, packaging."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pgfast
from pgfast.errors import MissingDependencyError, PgfastError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [path for folder in ("pgfast", "export", "train", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
COMMANDS = (
    "answer",
    "generate",
    "inspect",
    "doctor",
    "serve",
    "export",
    "engines",
    "train",
    "eval",
    "bench",
    "batch",
    "caption",
    "ocr",
    "question",
    "detect",
    "segment",
)
HEAVY = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "huggingface_hub"}


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    return set(out.stdout.splitlines()[-1].split())


def test_public_names_are_pinned() -> None:
    public = "Answer Detection EncodedImage Engine GenerateOptions PgfastError Segment Timings load"
    assert pgfast.__all__ == public.split()
    for name in pgfast.__all__:
        assert getattr(pgfast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pgfast.nothing  # noqa: B018


def test_the_public_api_keeps_its_signatures() -> None:
    import inspect

    def parameters(function: object) -> str:
        return ", ".join(inspect.signature(function).parameters)  # type: ignore[arg-type]

    engine = pgfast.Engine
    assert parameters(pgfast.load) == "bundle, provider, threads, device_id, spin"
    assert parameters(engine.answer) == "self, image, question, choices, language, options"
    assert parameters(engine.answer_batch) == "self, questions, language, options"
    assert parameters(engine.generate) == "self, image, prompt, options"
    assert parameters(engine.stream) == "self, image, prompt, options"
    assert parameters(engine.detect) == "self, image, labels, options"
    assert parameters(engine.segment) == "self, image, labels, options"
    assert parameters(engine.encode_image) == "self, image"
    options = "max_new_tokens, temperature, top_p, top_k, seed, stop, repetition_penalty, beams, length_penalty, min_confidence"
    assert parameters(pgfast.GenerateOptions) == options
    fields = "text, confidence, token_ids, token_logprobs, finish_reason, choices, timings, calibrated, unsure_of"
    assert parameters(pgfast.Answer) == fields
    assert parameters(pgfast.Timings) == "preprocess, vision, prefill, decode, ttft, total"


def test_importing_pgfast_is_light() -> None:
    assert not loaded_after("import pgfast") & (HEAVY | {"numpy", "onnxruntime", "PIL", "tokenizers", "click", "rich"})


def test_answering_needs_neither_torch_nor_the_other_rooms() -> None:
    picture = ROOT / "pgfast" / "demo" / "blue_circle.png"
    args = ["answer", str(picture), "what color is the shape?"]
    code = f"from pgfast.cli import main\ntry: main({args!r})\nexcept SystemExit: pass"
    loaded = loaded_after(code)
    assert "onnxruntime" in loaded
    assert not loaded & (HEAVY | {"importlib.metadata", "export", "train", "bench", "rich", "easy_vqa"})
    assert not any(name.startswith(("pgfast.export", "pgfast.train", "pgfast.bench")) for name in loaded)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(("." * node.level) + (node.module or ""))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    names = imports(path)
    if room == "pgfast":
        assert not {name.split(".")[0] for name in names} & HEAVY
        assert not any(name.startswith(("pgfast.export", "pgfast.train", "pgfast.bench")) for name in names)
    else:  # siblings relatively, the runtime absolutely: one module never has two names
        assert not any(name.split(".")[0] in ("export", "train", "bench") for name in names)
        depth = len(path.relative_to(ROOT).parts) - 1  # within its room, never above it
        assert not any(name.startswith("." * (depth + 1)) for name in names)
        assert not any(name.startswith(f"pgfast.{room}") for name in names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 330
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 65, node.name


def test_onnxruntime_is_imported_where_its_reports_are_turned_off() -> None:
    assert [path.name for path in SOURCES if "onnxruntime" in imports(path)] == ["providers.py"]


def test_every_package_is_listed() -> None:
    # two hold no code of their own to import: the bundle's files, and the file that optimum looks for
    listed = set(PROJECT["tool"]["setuptools"]["packages"]) - {"pgfast.demo.bundle", "optimum.commands.register"}
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES if path.name == "__init__.py"}
    assert listed == {name if name.startswith("pgfast") else f"pgfast.{name}" for name in found}


def test_the_wheel_holds_the_bundle_and_stays_small(tmp_path: Path) -> None:
    import zipfile

    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        "pgfast/py.typed",
        "pgfast/export/build.py",
        "pgfast/demo/blue_circle.png",
        "pgfast/server/page_files/index.html",
        "pgfast/server/page_files/page.js",
        "pgfast/demo/bundle/decoder.onnx.data",
    }
    assert wanted | {"optimum/commands/register/register_pgfast.py"} <= names
    assert not any(name.startswith(("tests/", "export/", "train/", "bench/")) for name in names)
    assert wheel.stat().st_size < 8 * 2**20


def test_every_extra_of_the_design_exists() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    assert {"cpu", "gpu", "tensorrt", "tensorrt-rtx", "export", "train", "serve", "scale", "bench"} <= extras


def test_the_changelog_has_this_version() -> None:
    assert f"## {pgfast.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_error_is_a_pgfast_error_and_says_what_to_install() -> None:
    from pgfast import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) == 12
    assert all(issubclass(cls, PgfastError) for cls in classes)
    assert str(MissingDependencyError("torch", "train")) == "torch is not installed: pip install 'pgfast[train]'"


@pytest.mark.parametrize(("command", "module", "extra"), [("export", "onnxscript", "export"), ("train", "torch", "train")])
def test_a_missing_extra_says_what_to_install(command: str, module: str, extra: str) -> None:
    args = {"export": ["export", "a", "b"], "train": ["train", "--preset", "tiny", "--out", "/nonexistent/out"]}[command]
    code = f"import sys\nsys.modules[{module!r}] = None\nfrom pgfast.cli import main\nmain({args!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"pip install 'pgfast[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def readme_blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return [block.split("\n", 1)[1] for block in text.split("```")[1::2] if block.split("\n", 1)[0] == language]


def test_readme_commands_are_ones_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    lines = [line for block in readme_blocks("") for line in block.splitlines()]
    assert len(lines) >= 8
    for line in lines:
        program, word = line.split()[:2]
        known = {"make": f"\n{word}:" in makefile, "pip": word == "install", "pgfast": word in COMMANDS}
        assert known[program], line


def test_the_readme_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = readme_blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith("blue 0.9")
    assert out.endswith("['no', 'circle']\n")
