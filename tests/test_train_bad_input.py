"""What a training run refuses or survives: one clear line, exit code 2, and nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_train_command import SMALL, command, evaluations, make_data, steps, train, write_rows

from pgfast.cli import main
from pgfast.loading import demo_bundle

Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "eval.jsonl", make_data(folder, 3, first=100))
    return write_rows(folder / "train.jsonl", make_data(folder, 8))


@pytest.fixture
def base(checkpoint: Path, tmp_path: Path) -> Path:
    """A base model to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "base"))


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The command exits with 2 and one line besides progress; nothing is on stdout."""
    with pytest.raises(SystemExit) as caught:
        main(["train", *args, *SMALL])
    out, err = capsys.readouterr()
    progress = ("rows ", "pictures ", "training ", "trainable parameters ", "continuing ", "evaluating ", "evaluated ", "row ")
    lines = [line for line in err.splitlines() if not line.startswith(progress)]
    assert (caught.value.code, out) == (2, ""), err
    assert len(lines) == 1, err
    assert lines[0].startswith("pgfast: error: ")
    return lines[0]


def words(base: Path | str, data: Path | str, out: Path, preset: str = "seed") -> tuple[str, ...]:
    return "--preset", preset, "--model", str(base), "--data", str(data), "--out", str(out), "--max-steps", "3"


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def first_matrix(tensors: dict[str, np.ndarray]) -> str:
    return next(name for name in sorted(tensors) if name.endswith("q_proj.weight") and "language" in name)


def widen(tensors: dict[str, np.ndarray]) -> None:
    name = first_matrix(tensors)
    tensors[name] = np.concatenate([tensors[name]] * 2)


DAMAGES: dict[str, tuple[Edit, str]] = {
    "truncated": (truncate, "base cannot be loaded"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no .safetensors in"),
    "missing tensor": (lambda f: edit_weights(f, lambda t: [t.pop(first_matrix(t))]), "missing keys"),
    "extra tensor": (lambda f: edit_weights(f, lambda t: t.update(extra=np.zeros(3, np.float32))), "unexpected keys extra"),
    "wrong shape": (lambda f: edit_weights(f, widen), "base"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{") and None, "config.json cannot be read"),
    "another model": (lambda f: edit_json(f / "config.json", model_type="llava"), "is a 'llava' model: only PaliGemma"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "no preprocessor": (lambda f: (f / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
    "eos null": (lambda f: edit_json(f / "config.json", eos_token_id=None) or drop_text_eos(f), "eos_token_id is None"),
    "eos list": (lambda f: edit_json(f / "config.json", eos_token_id=[1, 2]), "eos_token_id is [1, 2]"),
    "eos is a word": (lambda f: edit_json(f / "config.json", eos_token_id=7), "eos_token_id is 7"),
    "eos outside": (lambda f: edit_json(f / "config.json", eos_token_id=5000), "eos_token_id is 5000"),
    "small vocabulary": (lambda f: set_text(f, vocab_size=40), "do not belong together"),
}


def set_text(folder: Path, **values: Any) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"] | values
    edit_json(folder / "config.json", text_config=text)


def drop_text_eos(folder: Path) -> None:
    set_text(folder, eos_token_id=None)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_base_is_refused(
    name: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGES[name]
    damage(base)
    assert message in refused(capsys, *words(base, data, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoint").exists()
    if name not in ("truncated", "missing tensor", "extra tensor", "wrong shape"):  # the weights are not read by a dry run
        assert message in refused(capsys, *words(base, data, tmp_path / "run"), "--dry-run")


def test_ids_that_only_the_text_config_has_are_found(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads((base / "config.json").read_text())
    ids = {name: raw.pop(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (base / "config.json").write_text(json.dumps(raw))
    set_text(base, **ids)
    assert train(capsys, "seed", base, data, tmp_path / "run", "--max-steps", "1")["steps"] == 1


def test_what_is_no_base_model(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert "is an exported bundle" in refused(capsys, *words(demo_bundle(), data, out))
    adapter = tmp_path / "adapter"
    train(capsys, "lora", checkpoint, data, adapter, "--max-steps", "1")
    assert "is a LoRA adapter" in refused(capsys, *words(adapter / "checkpoint", data, out))
    assert "is a file" in refused(capsys, *words(data, data, out))
    assert "no base model" in refused(capsys, *words("", data, out))
    assert "neither a folder nor a Hub id" in refused(capsys, *words(tmp_path / "gone", data, out))
    assert "cannot be downloaded" in refused(capsys, *words("someone/nothing", data, out))  # conftest has the Hub offline


def row(**fields: Any) -> dict[str, Any]:
    return {"image": "0.png", "question": "is there red ?", "answer": "yes"} | fields


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "missing picture": (row(image="gone.png"), "the picture does not exist"),
    "no picture file": (row(image="train.jsonl"), "the picture is in no known format"),
    "empty answer": (row(answer=""), "the answer is empty"),
    "no answer": (row(answer=None), "the answer is empty"),
    "long answer": (row(answer="red " * 9), "the answer has 10 tokens: at most 8 (--max-answer-tokens, --cut-answers)"),
    "long question": (row(question="red " * 40), "the text has 43 tokens: this model takes at most 32"),
    "empty question": (row(question="  "), "the question is empty"),
    "double newline": ({"image": "0.png", "prefix": "answer red\n", "suffix": "yes"}, "there would be two"),
    "double bos": (row(question="<bos>is there red ?"), "<bos>"),
    "image token": (row(question="<image>is there red ?"), "<image>"),
    "double eos": (row(answer="yes<eos>"), "<eos>"),
    "no question": ({"image": "0.png", "answer": "yes"}, "neither of question and prefix"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_before_the_first_step_or_skipped(
    name: str, checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, message = BAD_ROWS[name]
    rows = write_rows(tmp_path / "rows.jsonl", [row(), bad, row(answer="no")])
    given = (*words(checkpoint, rows, tmp_path / "run"), "--images", str(data.parent))
    for more in ([], ["--dry-run"]):
        line = refused(capsys, *given, *more)
        assert message in line
        assert "1 of 3 rows cannot be used, first row 1" in line
        assert "--skip-bad" in line
    assert not (tmp_path / "run" / "state").exists()
    report = [json.loads(line) for line in (tmp_path / "run" / "bad-rows.jsonl").read_text().splitlines()]
    assert [(r["row"], message in r["reason"]) for r in report] == [(1, True)]
    assert json.loads(command(capsys, *given, *SMALL, "--skip-bad")[0])["steps"] == 3
    card = (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    assert "training: 2 of the " in card
    assert "1 rows could not be used" in card


def test_long_answers_are_cut_only_with_a_flag_and_counted(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [row(answer="red " * 9), row(answer="red " * 7)])
    given = (*words(checkpoint, rows, tmp_path / "run"), "--images", str(data.parent), *SMALL, "--cut-answers")
    dry, _ = command(capsys, *given, "--dry-run", "--batch-size", "2", "--accumulation", "1")
    assert ", 1 answers cut" in dry
    assert "rows with <eos>: 1 of 2" in dry
    assert "label tokens: 16 (8 to 8 per row)" in dry
    command(capsys, *given)
    assert "- 1 answers were cut to 8 tokens" in (tmp_path / "run" / "checkpoint" / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", ""], "no training data"),
        (["--data", "gone.jsonl"], "gone.jsonl does not exist"),
        (["--prompt", "answer {text}\n"], "--prompt holds a newline"),
        (["--prompt", "<bos>answer {text}"], "<bos>"),
        (["--prompt", "<image>answer {text}"], "<image>"),
        (["--holdout", "0.01"], "--holdout 0.01"),
        (["--max-prompt-tokens", "250"], "--max-prompt-tokens"),
        (["--eval-data", "UNANSWERED"], "there is no answer to compare with"),
        (["--eval-data", "gone.jsonl"], "gone.jsonl does not exist"),
    ],
)
def test_values_that_do_not_go_together(
    more: list[str], message: str, checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unanswered = write_rows(data.with_name("unanswered.jsonl"), [{"image": "0.png", "question": "is there red ?"}])
    more = [str(unanswered) if word == "UNANSWERED" else word for word in more]
    # the last one of a repeated flag counts, so SMALL goes first
    with pytest.raises(SystemExit) as caught:
        main(["train", *SMALL, *words(checkpoint, data, tmp_path / "run"), *more])
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert message.lower() in err.splitlines()[-1].lower()
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "state").exists()


def test_fp16_is_refused(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", *words(checkpoint, data, tmp_path / "run"), "--precision", "fp16"])
    assert caught.value.code == 2
    assert "--precision is 'fp16': one of auto, bf16, fp32" in capsys.readouterr().err


def test_folders_that_cannot_be_written(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        assert f"{out} cannot be created" in refused(capsys, *words(checkpoint, data, out))
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(SystemExit) as caught:
        main(["train", "--preset", "seed"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "pgfast: error: no --out: name the folder of the run\n"


def test_another_run_in_the_same_folder_is_named(
    checkpoint: Path, data: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given = words(checkpoint, data, out)
    command(capsys, *given, *SMALL)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    line = refused(capsys, *given, "--learning-rate", "1e-3", "--freeze", "vision")
    assert "--freeze was 'vision,projector' and is 'vision', --learning-rate was 2e-05 and is 0.001" in line
    assert "choose another --out" in line
    assert "--method was 'full' and is 'lora'" in refused(capsys, *words(checkpoint, data, out, "lora"))
    # the same words, other weights or other rows
    moved = Path(shutil.copytree(checkpoint, tmp_path / "moved"))
    second = tmp_path / "second"
    rows = write_rows(tmp_path / "rows.jsonl", [row(), row(answer="no")])
    again = (*words(moved, rows, second), "--images", str(data.parent))
    command(capsys, *again, *SMALL)
    edit_weights(moved, lambda tensors: tensors.update({first_matrix(tensors): tensors[first_matrix(tensors)] + 1}))
    assert "was trained from other weights" in refused(capsys, *again)
    shutil.copyfile(checkpoint / "model.safetensors", moved / "model.safetensors")
    write_rows(rows, [row(), row(answer="red")])
    assert "was trained on other rows" in refused(capsys, *again)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_damaged_state_is_told(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command(capsys, *words(checkpoint, data, out), *SMALL)
    (found,) = (out / "state").iterdir()
    for name in ("state.json", "weights.safetensors", "optimizer.safetensors", "random.safetensors"):
        whole = (found / name).read_bytes()
        (found / name).write_bytes(whole[: len(whole) // 2])
        assert "is damaged: remove it to start again" in refused(capsys, *words(checkpoint, data, out))
        (found / name).write_bytes(whole)


def poison(tensors: dict[str, np.ndarray]) -> None:
    tensors[first_matrix(tensors)] = tensors[first_matrix(tensors)] * np.float32("nan")


def test_a_loss_that_is_not_a_number_stops_the_run(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_weights(base, poison)
    line = refused(capsys, *words(base, data, tmp_path / "run"))
    assert "the loss is nan" in line
    assert "at step 1" in line
    assert "the last good state" not in line  # there is none
    (file,) = (tmp_path / "run").glob("bad-batch*.json")
    assert str(file) in line
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 16
    for found in rows:
        given = json.loads(data.read_text().splitlines()[found["row"]])
        assert (found["text"], found["answer"]) == (given["question"], given["answer"])
        assert given["question"].replace(" ", "") in found["decoded"].replace(" ", "")
        assert found["picture"] == str(data.with_name(given["image"]))
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_run_that_diverges_keeps_its_last_good_state(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    wild = ("--learning-rate", "1e30", "--warmup-steps", "3", "--clip-norm", "0", "--save-every", "1", "--max-steps", "9")
    line = refused(capsys, *words(checkpoint, data, out), *wild)
    number = int(line.split("at step ")[1].split(":")[0])
    assert number > 1
    (kept,) = (out / "state").iterdir()
    assert kept.name == f"step-{number - 1:08d}"
    assert f"the last good state in {out / 'state'}" in line
    assert len(steps(out)) == number - 1
    assert all(np.isfinite(float(step["loss"])) for step in steps(out))


def broken_picture(folder: Path, name: str) -> None:
    """A JPEG whose header is right and whose body ends early: found only when it is decoded."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / name, "JPEG", quality=95)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])


def test_a_picture_that_is_broken_inside(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Found while training: without --skip-bad the run stops and says which; with it the same folder goes on."""
    folder = Path(shutil.copytree(data.parent, tmp_path / "data"))
    broken_picture(folder, "broken.jpg")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[5]["image"] = "broken.jpg"
    write_rows(folder / "train.jsonl", rows)
    out = tmp_path / "run"
    # one row per step, so that steps before the broken one are done and kept
    given = (*words(checkpoint, folder / "train.jsonl", out), "--max-steps", "16", "--batch-size", "1", "--accumulation", "1")
    line = refused(capsys, *given)
    assert "row 5 (question 5)" in line
    assert "broken.jpg" in line or "truncated" in line
    assert "--skip-bad" in line
    done = steps(out)
    out_text, _ = command(capsys, *given, *SMALL, "--skip-bad")
    assert json.loads(out_text)["steps"] == 16
    assert "row 5 is left out" in caplog.text
    losses = [float(step["loss"]) for step in steps(out)]
    assert losses.count(0.0) == 1  # the step of the broken row teaches nothing
    assert [step["loss"] for step in steps(out)[: len(done)]] == [step["loss"] for step in done]
    (report,) = out.glob("unreadable-rows*.jsonl")
    assert [json.loads(text)["row"] for text in report.read_text().splitlines()] == [5]


def test_a_broken_picture_weighs_nothing_among_others(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other rows of its step teach what they would teach: the loss is theirs, as shares of the whole step."""
    folder = Path(shutil.copytree(data.parent, tmp_path / "data"))
    broken_picture(folder, "broken.jpg")
    good = [row(), row(image="1.png", answer="no"), row(image="2.png", answer="no")]
    losses = {}
    for name, rows in {"good": good, "all": [*good, row(image="broken.jpg")]}.items():
        write_rows(folder / f"{name}.jsonl", rows)
        one = ("--batch-size", str(len(rows)), "--accumulation", "1", "--max-steps", "1", "--skip-bad", "--precision", "fp32")
        train(capsys, "seed", checkpoint, folder / f"{name}.jsonl", tmp_path / name, *one)
        losses[name] = float(steps(tmp_path / name)[0]["loss"])
    assert losses["all"] == pytest.approx(losses["good"] * 3 / 4, rel=1e-5)


def test_a_broken_picture_of_the_evaluation_data(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(data.parent, tmp_path / "data"))
    broken_picture(folder, "broken.jpg")
    held = write_rows(folder / "held.jsonl", [row(), row(image="broken.jpg"), row(image="1.png", answer="no")])
    given = (*words(checkpoint, data, tmp_path / "run"), "--eval-data", str(held), "--evaluations", "1")
    line = refused(capsys, *given)
    assert "row 1 (question 1)" in line
    assert "--skip-bad" in line
    command(capsys, *given, *SMALL, "--skip-bad")
    assert [e["count"] for e in evaluations(tmp_path / "run")] == [2]
