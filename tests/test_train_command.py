"""`pgfast train` as a user meets it: presets from data on disk to a checkpoint that transformers and the engine run."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from pgfast.cli import main

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 160, 0)}
# the fixture's model has 256 positions; two processes that share the cores make each other's spinning threads slow
SMALL = ("--max-prompt-tokens", "32", "--max-answer-tokens", "8", "--max-new-tokens", "4", "--threads", "1")
TOWERS = {"vision_tower": "vision", "multi_modal_projector": "projector", "language_model": "language", "lm_head": "language"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_data(folder: Path, pictures: int, first: int = 0) -> list[dict[str, Any]]:
    """Pictures of a coloured rectangle with two questions each."""
    rng, rows = np.random.default_rng(first), []
    for number in range(first, first + pictures):
        color = list(COLORS)[number % 3]
        image = np.full((40, 50, 3), 255, np.uint8)
        top, left = rng.integers(0, 20, 2)
        image[top : top + 20, left : left + 25] = COLORS[color]
        Image.fromarray(image).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what color is the shape ?", "answer": color})
        rows.append({"image": f"{number}.png", "question": "is there red ?", "answer": "yes" if color == "red" else "no"})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "eval.jsonl", make_data(folder, 6, first=100))
    return write_rows(folder / "train.jsonl", make_data(folder, 15))


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["train", *args])
    out, err = capsys.readouterr()
    assert caught.value.code == 0, err
    return out, err


def train(capsys: pytest.CaptureFixture[str], preset: str, base: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    words = ("--preset", preset, "--model", str(base), "--data", str(data), "--out", str(out), *SMALL, *more)
    (line,) = command(capsys, *words)[0].splitlines()
    report: dict[str, Any] = json.loads(line)
    return report


def steps(out: Path) -> list[dict[str, str]]:
    with (out / "steps.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]


def tower(name: str) -> str:
    return next(TOWERS[part] for part in name.split(".") if part in TOWERS)


def changed_towers(base: Path, checkpoint: Path) -> set[str]:
    """Towers with a tensor that is not bit for bit the base's."""
    before, after = load_file(base / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert set(before) == set(after)
    return {tower(name) for name in before if before[name].tobytes() != after[name].tobytes()}


def test_the_seed_preset_end_to_end(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pgfast.train.presets import resolve
    from transformers import PaliGemmaForConditionalGeneration

    out, held = tmp_path / "run", str(data.with_name("eval.jsonl"))
    report = train(capsys, "seed", checkpoint, data, out, "--eval-data", held, "--precision", "fp32")
    assert report == {
        "steps": 18,  # 30 rows * 10 epochs // 16
        "loss": pytest.approx(float(steps(out)[-1]["loss"])),
        "accuracy": max(e["accuracy"] for e in evaluations(out)),
        "checkpoint_step": max(evaluations(out), key=lambda e: (e["accuracy"], -e["loss"]))["step"],
        "stopped_early": False,
        "checkpoint": str(out / "checkpoint"),
    }
    files = {path.name for path in out.iterdir()}
    assert files == {"config.json", "steps.csv", "evaluations.jsonl", "tensorboard", "state", "checkpoint"}
    assert [path.name for path in (out / "state").iterdir()] == ["step-00000018"]
    assert list((out / "tensorboard").iterdir())
    overrides = {"model": str(checkpoint), "data": str(data), "eval_data": held, "precision": "fp32", "threads": 1}
    overrides |= {"max_prompt_tokens": 32, "max_answer_tokens": 8, "max_new_tokens": 4}
    assert json.loads((out / "config.json").read_text()) == dataclasses.asdict(resolve("seed", overrides))
    rows = steps(out)
    assert [int(row["step"]) for row in rows] == list(range(1, 19))
    # linear with 2 warm-up steps, by hand
    rates = [0.0, 1e-5, *(2e-5 * (18 - step) / 16 for step in range(2, 18))]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(rates)
    assert [float(row["epoch"]) for row in rows] == pytest.approx([16 * step / 30 for step in range(1, 19)])
    assert [e["step"] for e in evaluations(out)] == [4, 9, 14, 18]
    assert {e["count"] for e in evaluations(out)} == {12}
    for before, after, e in zip([0, 4, 9, 14], [4, 9, 14, 18], evaluations(out), strict=True):
        assert e["training_loss"] == pytest.approx(np.mean([float(row["loss"]) for row in rows[before:after]]))
    model, found = PaliGemmaForConditionalGeneration.from_pretrained(out / "checkpoint", output_loading_info=True)
    assert not any(found.values()), found
    assert model.config.get_text_config().vocab_size == 1280
    assert changed_towers(checkpoint, out / "checkpoint") == {"language"}


def test_the_card_says_everything(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, held = tmp_path / "my-run", str(data.with_name("eval.jsonl"))
    train(capsys, "seed", checkpoint, data, out, "--eval-data", held, "--precision", "fp32")
    lines = (out / "checkpoint" / "README.md").read_text().splitlines()
    assert lines[0] == "---"
    assert lines[1:].index("---") > 2
    wanted = ["# my-run", "- learning_rate: 2e-05", "- train_batch_size: 4", "- eval_batch_size: 8", "- seed: 42"]
    wanted += ["- gradient_accumulation_steps: 4", "- total_train_batch_size: 16", "- lr_scheduler_type: linear"]
    wanted += ["- optimizer: Adam with betas=(0.9,0.999) and epsilon=1e-08", "- lr_scheduler_warmup_steps: 2"]
    wanted += ["- num_epochs: 10", "- mixed_precision: fp32", "- preset: seed", "### Training hyperparameters"]
    wanted += [f"- {name} {importlib.metadata.version(name)}" for name in ("pgfast", "transformers", "torch", "tokenizers")]
    wanted += ["pgfast export THIS_FOLDER bundle --precision int8", 'pgfast answer picture.jpg "what is this?" -m bundle']
    assert [line for line in wanted if line not in [have.replace("num_epochs: 10.0", "num_epochs: 10") for have in lines]] == []
    text = "\n".join(lines)
    assert f"of {checkpoint.name} on" in text
    assert "`answer {text}`" in text
    assert "training: 30 of the 30 rows" in text
    assert "evaluation: 12 of the 12 rows" in text
    # one line per evaluation, the best one's checkpoint not being the last
    head = lines.index("| Training Loss | Epoch | Step | Validation Loss | VQA Accuracy |")
    for line, e in zip(lines[head + 2 : head + 6], evaluations(out), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert [float(cell) for cell in cells] == pytest.approx(
            [e["training_loss"], e["epoch"], e["step"], e["loss"], e["accuracy"]], abs=6e-5
        )
    assert lines[head + 6] == ""


def test_the_accuracy_of_a_run_is_that_of_its_checkpoint(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same figure through transformers' `generate`; the model has learned something by then."""
    from pgfast.train.data.sources import open_dataset
    from pgfast.train.evaluation.answering import answer_with_checkpoint
    from pgfast.train.evaluation.scores import score
    from pgfast.train.evaluation.transformers_model import load_checkpoint

    out, held = tmp_path / "run", data.with_name("eval.jsonl")
    fast = ("--learning-rate", "3e-3", "--max-steps", "40", "--batch-size", "8", "--accumulation", "1", "--freeze", "")
    report = train(capsys, "seed", checkpoint, data, out, "--eval-data", str(held), *fast)
    dataset = open_dataset(str(held))
    answers = answer_with_checkpoint(load_checkpoint(str(out / "checkpoint")), dataset)
    found = score((dataset.record(row), prediction.text) for row, prediction in answers.predictions.items())
    assert found.overall is not None
    assert report["accuracy"] == pytest.approx(found.overall.accuracy)
    assert report["accuracy"] >= 0.5
    losses = [float(row["loss"]) for row in steps(out)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert changed_towers(checkpoint, out / "checkpoint") == {"vision", "projector", "language"}


@pytest.mark.parametrize("freeze", ["language", "vision", "projector,language"])
def test_frozen_towers_do_not_change(
    freeze: str, checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--max-steps", "3", "--learning-rate", "1e-2", "--weight-decay", "0.1", "--freeze", freeze)
    train(capsys, "seed", checkpoint, data, tmp_path / "run", *few)
    trained = {"vision", "projector", "language"} - set(freeze.split(","))
    assert changed_towers(checkpoint, tmp_path / "run" / "checkpoint") == trained


def test_trainable_parameters_are_printed_per_tower(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 8 beside each of seven matrices in each of two layers: 8 * (in + out)."""
    words = ("--preset", "lora", "--model", str(checkpoint), "--data", str(data), "--out", str(tmp_path / "run"), *SMALL)
    _, shown = command(capsys, *words, "--max-steps", "1")
    hidden, heads, kv, inner = 48, 64, 32, 72
    ins_and_outs = 2 * (hidden + heads) + 2 * (hidden + kv) + 3 * (hidden + inner)
    assert f"vision 0, projector 0, language {2 * 8 * ins_and_outs:,}" in shown


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_then_export_then_answer(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompt of the run arrives in the bundle, and the bundle answers as transformers with PEFT does."""
    import peft
    from pgfast.train.data.sources import open_dataset
    from pgfast.train.evaluation.answering import answer_with_bundle, answer_with_checkpoint
    from pgfast.train.evaluation.transformers_model import load_checkpoint

    import pgfast

    out, bundle, template = tmp_path / "run", tmp_path / "bundle", "the {text} in a picture"
    fast = ("--learning-rate", "1e-2", "--max-steps", "60", "--prompt", template, "--holdout", "0.2", "--precision", "fp32")
    train(capsys, "lora", checkpoint, data, out, *fast)
    adapter = out / "checkpoint"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2  # A and B of seven matrices in each of two layers
    assert {tower(name) for name in tensors} == {"language"}
    assert all(array.dtype == np.float32 and array.any() for array in tensors.values())
    card = (adapter / "README.md").read_text()
    assert "--adapter THIS_FOLDER" in card
    assert "| vision | 0 |" in card

    with pytest.raises(SystemExit) as caught:
        main(["export", str(checkpoint), str(bundle), "--adapter", str(adapter), "--precision", "fp32"])
    assert caught.value.code == 0, capsys.readouterr().err
    assert json.loads((bundle / "pgfast.json").read_text())["prompts"]["answer"] == template
    dataset = open_dataset(str(data.with_name("eval.jsonl")))
    plain = load_checkpoint(str(checkpoint))
    model = peft.PeftModel.from_pretrained(plain.model, adapter).eval()
    wanted = answer_with_checkpoint(dataclasses.replace(plain, model=model, template=template), dataset).predictions
    with pgfast.load(bundle, provider="cpu", threads=1) as engine:
        answers = answer_with_bundle(engine, dataset, options=pgfast.GenerateOptions(max_new_tokens=plain.max_tokens))
    assert [p.text for p in answers.predictions.values()] == [p.text for p in wanted.values()]
    assert [p.confidence for p in answers.predictions.values()] == pytest.approx(
        [p.confidence for p in wanted.values()], abs=1e-4
    )
    assert len({p.text for p in wanted.values()}) > 1
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["answer", str(data.with_name("100.png")), "what color is the shape ?", "-m", str(bundle)])
    assert (caught.value.code, capsys.readouterr().out.strip()) == (0, next(iter(wanted.values())).text)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_qlora_keeps_a_four_bit_base(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    from pgfast.train import trainer

    made: list[Any] = []
    build = trainer.build
    monkeypatch.setattr(trainer, "build", lambda *args, **how: made.append(build(*args, **how)) or made[-1])  # type: ignore[func-returns-value]
    fast = ("--learning-rate", "1e-2", "--max-steps", "20", "--precision", "fp32")
    train(capsys, "qlora", checkpoint, data, tmp_path / "run", *fast)
    four_bit = {name for name, p in made[0].model.named_parameters() if type(p).__name__ == "Params4bit"}
    assert len(four_bit) == 7 * 2
    assert {tower(name) for name in four_bit} == {"language"}
    assert all(p.element_size() == 1 for name, p in made[0].model.named_parameters() if name in four_bit)
    assert {tower(n) for n, p in made[0].model.named_parameters() if p.requires_grad} == {"language"}
    losses = [float(row["loss"]) for row in steps(tmp_path / "run")]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert {tower(name) for name in load_file(tmp_path / "run" / "checkpoint" / "adapter_model.safetensors")} == {"language"}


def test_bv_teaches_the_human_answers_in_turn(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pgfast.train import batches

    taught: list[list[int]] = []
    collate = batches.collate
    monkeypatch.setattr(
        batches, "collate", lambda rows, **special: taught.extend(r.suffix for r in rows) or collate(rows, **special)
    )
    answers = ["red", "blue", "green", "red circle", ""]  # an annotator may have written nothing
    image = data.with_name("0.png")
    rows = write_rows(tmp_path / "one.jsonl", [{"image": image.name, "question": "what color ?", "answers": answers}])
    few = ("--images", str(image.parent), "--batch-size", "1", "--accumulation", "1", "--epochs", "8")
    assert train(capsys, "bv", checkpoint, rows, tmp_path / "run", *few)["steps"] == 8
    for cycle in (taught[:4], taught[4:]):
        assert len({tuple(ids) for ids in cycle}) == 4
        assert sorted(map(len, cycle)) == [2, 2, 2, 3]


def test_an_answer_that_is_not_taught_may_be_anything(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """VQAv2's ten answers hold empty and odd ones; the seed preset teaches the most common one alone."""
    answers = ["red", "red", "red", "", "the <image> is red", "red " * 30]
    row = {"image": "0.png", "question": "what color ?", "answers": answers}
    rows = write_rows(tmp_path / "one.jsonl", [row])
    few = ("--images", str(data.parent), "--max-steps", "1")
    assert train(capsys, "seed", checkpoint, rows, tmp_path / "run", *few)["steps"] == 1


def test_a_finished_run_is_not_trained_further(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--max-steps", "3", "--holdout", "0.2", "--learning-rate", "1e-3")
    report = train(capsys, "seed", checkpoint, data, tmp_path / "run", *words)
    weights = (tmp_path / "run" / "checkpoint" / "model.safetensors").read_bytes()
    again = train(capsys, "seed", checkpoint, data, tmp_path / "run", *words)
    assert again == report | {"loss": None}
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").read_bytes() == weights
    assert len(steps(tmp_path / "run")) == 3


def test_of_equal_accuracies_the_lower_loss_is_kept(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pgfast.train import validation
    from pgfast.train.evaluation.scores import Group, Score

    found = iter([(2.0, 0.5), (1.0, 0.5), (3.0, 0.5), (0.5, 0.25)])

    def given(*_: Any) -> tuple[float, Score]:
        loss, accuracy = next(found)
        return loss, Score("official", Group(accuracy, 6), {}, {}, 0)

    monkeypatch.setattr(validation.Validation, "run", given)
    report = train(capsys, "seed", checkpoint, data, tmp_path / "run", "--max-steps", "4", "--holdout", "0.2")
    assert (report["accuracy"], report["checkpoint_step"]) == (0.5, 2)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--prompt", "answer {language} {text}"], "answer {language} {text}"),
        # inference asks in English unless told otherwise
        (["--prompt", "answer {language} {text}", "--language", "fr"], "answer fr {text}"),
    ],
)
def test_the_template_is_the_one_that_was_trained(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], kept: str
) -> None:
    train(capsys, "seed", checkpoint, data, tmp_path / "run", "--max-steps", "1", *words)
    assert json.loads((tmp_path / "run" / "checkpoint" / "pgfast_prompts.json").read_text()) == {"answer": kept}
    assert f"`{kept}`" in (tmp_path / "run" / "checkpoint" / "README.md").read_text()


def test_whole_prompts_leave_no_template(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"image": row["image"], "prefix": f"answer en {row['question']}", "suffix": row["answer"]} for row in read_rows(data)
    ]
    train(capsys, "seed", checkpoint, write_rows(data.with_name("prefix.jsonl"), rows), tmp_path / "run", "--max-steps", "1")
    assert not (tmp_path / "run" / "checkpoint" / "pgfast_prompts.json").exists()
    assert "without a template" in (tmp_path / "run" / "checkpoint" / "README.md").read_text()


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_early_stop(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate of 0 never gets better than the first evaluation."""
    words = ("--max-steps", "12", "--holdout", "0.2", "--learning-rate", "0", "--evaluations", "6", "--patience", "2")
    report = train(capsys, "seed", checkpoint, data, tmp_path / "run", *words)
    assert (report["steps"], report["stopped_early"]) == (6, True)
    assert len(evaluations(tmp_path / "run")) == 3
    # the same command does not go on with what was stopped; more patience does
    again = train(capsys, "seed", checkpoint, data, tmp_path / "run", *words)
    assert (again["steps"], again["stopped_early"]) == (6, True)
    more = train(capsys, "seed", checkpoint, data, tmp_path / "run", *words[:-1], "4")
    assert (more["steps"], more["stopped_early"]) == (10, True)


def test_a_base_from_the_hub_is_named_by_its_id(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the folder of this machine's cache, which means nothing where the adapter is used."""
    from pgfast.export.checkpoint import CheckpointFolder
    from pgfast.train import setup

    hub = CheckpointFolder(checkpoint, "google/paligemma-3b-pt-224", "35e4f46")
    monkeypatch.setattr(setup, "locate", lambda name: hub)
    train(capsys, "lora", Path("google/paligemma-3b-pt-224"), data, tmp_path / "run", "--max-steps", "1")
    saved = json.loads((tmp_path / "run" / "checkpoint" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "google/paligemma-3b-pt-224"
    card = (tmp_path / "run" / "checkpoint" / "README.md").read_text().splitlines()
    assert "base_model: google/paligemma-3b-pt-224" in card
    assert "pgfast export google/paligemma-3b-pt-224 bundle --adapter THIS_FOLDER --precision int8" in card
