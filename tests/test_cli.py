"""The command line as a user meets it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_image import BAD, bad_pictures

import pgfast
from pgfast.cli import cli, main
from pgfast.loading import demo_bundle

PICTURE = str(demo_bundle().parent / "blue_circle.png")


def run(*args: str, env: dict[str, str] | None = None, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    import os

    command = [sys.executable, "-m", "pgfast", *args]
    return subprocess.run(command, capture_output=True, env={**os.environ, **(env or {})}, input=data, check=False)


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The command exits with 2, prints one line on stderr and nothing on stdout."""
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("pgfast: the embedded")]
    assert caught.value.code == 2
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("pgfast: error: ")
    return lines[0]


def test_the_answer_alone_is_on_stdout() -> None:
    done = run("answer", PICTURE, "what color is the shape?")
    assert (done.returncode, done.stdout) == (0, b"blue\n")
    assert b"embedded demo model" in done.stderr
    assert b"on cpu" in done.stderr


def test_json_is_one_document() -> None:
    done = run("answer", PICTURE, "is there a circle?", "--json", "--choices", "yes,no")
    answer = json.loads(done.stdout)
    assert answer["text"] == "yes"
    assert set(answer["choices"]) == {"yes", "no"}
    assert set(answer["timings"]) == {"preprocess", "vision", "prefill", "decode", "ttft", "total"}


def test_the_picture_can_come_from_stdin() -> None:
    assert run("answer", "-", "what shape is present?", data=Path(PICTURE).read_bytes()).stdout == b"circle\n"


def test_the_bundle_can_come_from_the_environment(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(demo_bundle(), tmp_path / "mine"))
    done = run("answer", PICTURE, "what color is the shape?", env={"PGFAST_MODEL": str(copy)})
    assert done.stdout == b"blue\n"
    assert b"embedded" not in done.stderr
    assert run("answer", PICTURE, "red?", env={"PGFAST_MODEL": str(tmp_path / "gone")}).returncode == 2


def test_generate_prints_and_streams_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for extra in ([], ["--stream"]):
        with pytest.raises(SystemExit) as caught:
            main(["generate", PICTURE, "answer en what color is the shape?", *extra])
        assert caught.value.code == 0
        outputs.append(capsys.readouterr().out)
    assert outputs == ["blue\n", "blue\n"]


@pytest.mark.parametrize("name", [name for name in BAD if name != "empty bytes"])
def test_bad_pictures(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, message = bad_pictures(tmp_path)[name]
    assert message in fails(capsys, "answer", str(given), "what color is the shape?")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("shape " * 300, "at most 128"),
        ("is <image> red?", "<image>"),
        ("is <loc0001> red?", "<loc0001>"),
        ("red <eos>", "<eos>"),
    ],
)
def test_bad_questions(question: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(capsys, "answer", PICTURE, question)


def test_warnings_of_the_library_begin_with_the_programs_name() -> None:
    done = run("answer", str(PICTURE), "is it a zebra\x1b[31m?")
    assert done.returncode == 0
    lines = [line for line in done.stderr.decode().splitlines() if "no words" in line]
    assert lines
    assert all(line.startswith("pgfast: the model has no words for: ") and line.isprintable() for line in lines)


def test_bad_bundles_and_providers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(demo_bundle(), tmp_path / "copy"))
    data = bytearray((copy / "decoder.onnx.data").read_bytes())
    data[1000] ^= 255
    (copy / "decoder.onnx.data").write_bytes(data)
    assert "decoder.onnx.data was changed" in fails(capsys, "answer", PICTURE, "red?", "-m", str(copy))
    assert "decoder.onnx.data was changed" in fails(capsys, "inspect", str(copy))
    (copy / "decoder.onnx.data").unlink()
    assert "decoder.onnx.data is missing" in fails(capsys, "answer", PICTURE, "red?", "-m", str(copy))
    assert "unknown provider 'tpu'" in fails(capsys, "answer", PICTURE, "red?", "--provider", "tpu")
    assert "pgfast[gpu]" in fails(capsys, "answer", PICTURE, "red?", "--provider", "cuda")


def test_a_reader_that_goes_away_gets_no_complaint() -> None:
    command = f"{sys.executable} -m pgfast inspect --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_full_output_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "pgfast", "inspect"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"pgfast: error: ")
    assert len(done.stderr.splitlines()) == 1


def test_control_characters_of_a_bundle_do_not_reach_the_terminal(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(demo_bundle(), tmp_path / "copy"))
    raw = json.loads((copy / "pgfast.json").read_text())
    raw["source"]["checkpoint"] = "evil\x1b[31m\nname"
    (copy / "pgfast.json").write_text(json.dumps(raw))
    done = run("answer", PICTURE, "what color is the shape?", "-m", str(copy))
    assert done.stdout == b"blue\n"
    assert b"\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert b"\x1b" not in run("inspect", str(copy)).stdout


def test_export_errors(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "exists" in fails(capsys, "export", str(checkpoint), str(tmp_path))
    (tmp_path / "empty").mkdir()
    assert "no config.json" in fails(capsys, "export", str(tmp_path / "empty"), str(tmp_path / "out"))


def test_export_inspect_and_answer(checkpoint: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = run("export", str(checkpoint), out, "--precision", "fp16", "--verify", "--answer-template", "answer {text}")
    assert done.returncode == 0, done.stderr
    shown = run("inspect", out, "--check").stdout.decode()
    assert "fp16 (vision fp16), for cpu (ort operators)" in shown
    assert "greedy_agreement" in shown
    assert "all hashes match" in shown
    manifest = json.loads(run("inspect", out, "--json").stdout)
    assert manifest["prompts"]["answer"] == "answer {text}"
    assert manifest["parity"]["max_relative_logit_error"] < 5e-3
    assert run("answer", PICTURE, "red?", "-m", out, "--max-new-tokens", "3").returncode == 0


def test_inspect_reckons_the_memory_of_a_batch() -> None:
    """Cache of 4 layers, 1 head of 32, 768 slots; 64 image tokens of 128; 1,280 logits; all in fp32."""
    row = 2 * 4 * 1 * 768 * 32 * 4 + 64 * 128 * 4 + 1280 * 4
    found = json.loads(run("inspect", "--json", "--batch", "3").stdout)["memory"]
    assert found["per_row"] == row
    assert found["total"] == found["weights"] + 3 * row
    assert f"each row {row:,}" in run("inspect").stdout.decode()


def test_doctor_tries_every_provider() -> None:
    done = run("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["pgfast"] == pgfast.__version__
    assert report["providers"]["cpu"] == "works"
    assert "pip install" in report["providers"]["tensorrt-rtx"]
    assert b"Python" in run("doctor").stdout


def test_help_of_every_command() -> None:
    runner = CliRunner()
    listed = runner.invoke(cli, ["--help"]).output
    for name in ("answer", "generate", "inspect", "doctor", "export", "train", "bench"):
        assert name in listed
        result = runner.invoke(cli, [name, "--help"])
        assert result.exit_code == 0, result.output
    assert runner.invoke(cli, ["train", "tiny", "--help"]).output.count("--") > 10


def test_usage_errors_exit_with_2() -> None:
    assert run("nothing").returncode == 2
    assert run("answer").returncode == 2
    assert run("answer", PICTURE, "red?", "--threads", "many").returncode == 2
    assert run("--version").stdout.decode().strip() == f"pgfast {pgfast.__version__}"


def test_startup_benchmark_prints_its_three_figures() -> None:
    report = json.loads(run("bench", "startup", "--runs", "1", "--json").stdout)
    assert len(report["milliseconds"]) == 4
    assert all(row["median"] > 0 for row in report["milliseconds"].values())
