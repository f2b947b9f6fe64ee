"""`pgfast train --dry-run`: what it shows is what the run would do, and it writes nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from test_train_command import SMALL, TOWERS, command, make_data, tower, train, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_rows(folder / "train.jsonl", make_data(folder, 8))


def rehearse(capsys: pytest.CaptureFixture[str], preset: str, base: Path, data: Path, *more: str) -> str:
    words = ("--preset", preset, "--model", str(base), "--data", str(data), *SMALL, "--dry-run", *more)
    return command(capsys, *words)[0]


def parameters(shown: str) -> dict[str, tuple[int, int]]:
    rows = re.findall(r"^  (\w+) +([\d,]+) +([\d,]+)$", shown, re.MULTILINE)
    return {name: (int(trainable.replace(",", "")), int(total.replace(",", ""))) for name, trainable, total in rows}


def test_it_shows_the_first_batch_as_the_model_will_see_it(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pgfast.train import batches

    shown = rehearse(capsys, "seed", checkpoint, data)
    assert "preset seed, method full" in shown
    assert "training data: 16 of 16 rows of" in shown
    assert "0 unusable, 0 answers cut" in shown
    assert "evaluation data: none" in shown
    assert "10 steps of 16 rows = 10.00 epochs" in shown
    batch = re.findall(r"<image> x (\d+) '(.*)' \| '(.*)'", shown)
    assert len(batch) == 4
    for count, prompt, answer in batch:
        assert count == "16"
        assert prompt.count("<bos>") == prompt.count(r"\n") == 1
        assert prompt.startswith("<bos> answer ")
        assert answer.endswith(" <eos>")
    # the same rows that the run then takes first
    fed: list[list[int]] = []
    collate = batches.collate
    monkeypatch.setattr(
        batches, "collate", lambda rows, **special: fed.extend(list(r.suffix) for r in rows) or collate(rows, **special)
    )
    train(capsys, "seed", checkpoint, data, tmp_path / "run", "--max-steps", "1")
    assert f"label tokens: {sum(map(len, fed[:4]))} (2 to 2 per row)" in shown
    assert "rows with <eos>: 4 of 4" in shown


def test_cycled_answers_are_shown_as_they_will_be_taught(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answers = ["red", "red", "blue circle", "green circle", "yes circle", "no circle", "the circle"]
    rows = write_rows(tmp_path / "rows.jsonl", [{"image": "0.png", "question": "what ?", "answers": answers}])
    words = ("--images", str(data.parent), "--batch-size", "8", "--accumulation", "1")
    shown = rehearse(capsys, "seed", checkpoint, rows, "--answers", "cycle", *words)
    assert re.search(r"label tokens: \d+ \(2 to 3 per row\)", shown)


def test_the_mask_is_drawn_from_the_definition(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Image and prompt see each other and no answer; an answer token sees all that is not behind it."""
    shown = rehearse(capsys, "seed", checkpoint, data)
    drawing = re.findall(r"^  (image|prompt|answer) +([#.]+)$", shown, re.MULTILINE)
    names = [name for name, _ in drawing]
    assert names[:2] == ["image", "image"]
    assert names == sorted(names, key=["image", "prompt", "answer"].index)
    assert f"          {''.join(name[0] for name in names)}\n" in shown
    prefix = len(names) - names.count("answer")
    for q, (_, line) in enumerate(drawing):
        assert line == "".join("#" if k < prefix or k <= q else "." for k in range(len(names)))
    assert names.count("answer") == 2


@pytest.mark.parametrize(
    ("preset", "more", "trained"),
    [
        ("seed", (), {"language"}),
        ("bv", ("--accumulation", "1"), {"vision", "projector", "language"}),
        ("seed", ("--freeze", "language"), {"vision", "projector"}),
    ],
)
def test_parameters_are_counted_per_tower(
    preset: str, more: tuple[str, ...], trained: set[str], checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import PaliGemmaForConditionalGeneration

    wanted = dict.fromkeys(set(TOWERS.values()), 0)
    for name, parameter in PaliGemmaForConditionalGeneration.from_pretrained(checkpoint).named_parameters():
        wanted[tower(name)] += parameter.numel()
    found = parameters(rehearse(capsys, preset, checkpoint, data, *more))
    assert found.pop("together") == (sum(wanted[name] for name in trained), sum(wanted.values()))
    assert found == {name: (count if name in trained else 0, count) for name, count in wanted.items()}


@pytest.mark.parametrize("preset", ["lora", "qlora"])
def test_adapters_are_counted_in_the_language_model_alone(
    preset: str, checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = parameters(rehearse(capsys, preset, checkpoint, data, "--lora-rank", "4"))
    # rank * (in + out) of q, k, v, o, gate, up, down; hidden 48, 4 heads and 2 of keys of 16, intermediate 72, two layers
    assert found["language"][0] == 2 * 4 * ((48 + 64) + 2 * (48 + 32) + (64 + 48) + 2 * (48 + 72) + (72 + 48))
    assert found["vision"][0] == found["projector"][0] == 0


def test_nothing_is_written(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(data.parent.iterdir()), sorted(checkpoint.iterdir())
    rehearse(capsys, "seed", checkpoint, data, "--out", str(tmp_path / "run"), "--feature-cache", str(tmp_path / "cache"))
    assert list(tmp_path.iterdir()) == []
    assert (sorted(data.parent.iterdir()), sorted(checkpoint.iterdir())) == before


@pytest.fixture(scope="module")
def real_size(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of google/paligemma-3b-pt-224, with weights that nothing reads."""
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("real") / "paligemma"))
    raw = json.loads((folder / "config.json").read_text())
    raw["vision_config"] |= {"image_size": 224, "patch_size": 14, "hidden_size": 1152, "intermediate_size": 4304}
    raw["vision_config"] |= {"num_attention_heads": 16, "num_hidden_layers": 27, "projection_dim": 2048}
    raw["text_config"] |= {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "vocab_size": 257152}
    raw["text_config"] |= {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 8192}
    raw |= {"hidden_size": 2048, "projection_dim": 2048}
    (folder / "config.json").write_text(json.dumps(raw))
    size = json.loads((folder / "preprocessor_config.json").read_text()) | {"size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(size))
    return folder


def test_the_estimate_of_the_real_model(
    real_size: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts as PEFT and transformers print them for the real checkpoint; bytes and FLOPs by hand."""
    monkeypatch.setattr("pgfast.train.estimate._measure", lambda device, dtype: 1e12)
    full, lora = (rehearse(capsys, preset, real_size, data, "--precision", "bf16") for preset in ("seed", "lora"))
    assert parameters(lora)["language"] == (9_805_824, 2_508_531_712 + 9_805_824)
    assert parameters(full)["language"] == (2_508_531_712, 2_508_531_712)
    assert parameters(full)["together"][1] == 2_923_335_408
    memory = r"weights ([\d.]+), gradients ([\d.]+), optimizer ([\d.]+)"
    (heavy,), (light,) = re.findall(memory, full), re.findall(memory, lora)
    # fp32 masters and the bf16 copy of a pass; a gradient and two moments in fp32
    assert [float(value) for value in heavy] == pytest.approx([2.923 * 6, 2.509 * 4, 2.509 * 8], abs=0.02)
    # bf16 base, fp32 adapters
    assert [float(value) for value in light] == pytest.approx([2.923 * 2 + 0.039, 0.039, 0.078], abs=0.03)
    # a sample: 0.220 T for the tower, 2 FLOPs per weight of the blocks and position, forward and twice backward
    (flops,) = re.findall(r"arithmetic: ([\d.]+) TFLOP", full)
    positions = 256 + 11
    assert float(flops) == pytest.approx(16 * (0.220 + 3 * 2 * 1.981e-3 * positions), rel=0.05)
    assert f"time, at the least: {float(flops):.2f} s a step, {float(flops) * 10 / 3600:.2f} h in all (1,000 GFLOP/s" in full


def test_the_demo_recipe_is_rehearsed_without_a_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import easy_vqa

    paths, questions = easy_vqa.get_train_image_paths(), zip(*easy_vqa.get_train_questions(), strict=True)
    few = [question for question in questions if question[2] < 60]
    monkeypatch.setattr(easy_vqa, "get_train_image_paths", lambda: {id: path for id, path in paths.items() if id < 60})
    monkeypatch.setattr(easy_vqa, "get_train_questions", lambda: tuple(map(list, zip(*few, strict=True))))
    words = ("--preset", "tiny", "--threads", "1", "--tower-batch", "4", "--dry-run")
    out, _ = command(capsys, *words, "--out", str(tmp_path / "run"))
    assert "8,000 steps of 96 rows" in out
    assert list(tmp_path.iterdir()) == []
