"""The embedded model: as accurate through ONNX as through transformers, and right on pictures it was not trained on."""

from __future__ import annotations

import dataclasses
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import DEMO_CHECKPOINT, TESTS
from pgfast.bench import accuracy
from pgfast.export.build import export
from pgfast.export.plan import ExportOptions
from pgfast.train.demo import easy_vqa_data
from pgfast.train.demo.score import score_scenes
from pgfast.train.demo.tiny_paligemma import IMAGE_SPEC
from PIL import Image, ImageDraw

from pgfast import GenerateOptions
from pgfast.bundle import sha256_of
from pgfast.engine import Engine
from pgfast.image import normalize, open_image, to_pixel_values
from pgfast.loading import demo_bundle


@pytest.fixture(scope="module")
def test_split() -> easy_vqa_data.Questions:
    return easy_vqa_data.load("test")


def transformers_answers(questions: easy_vqa_data.Questions, demo: Engine) -> list[list[int]]:
    """Greedy ids of every question, by transformers' own generate in batches of equal prompt length."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    model = PaliGemmaForConditionalGeneration.from_pretrained(DEMO_CHECKPOINT, dtype=torch.float32, attn_implementation="eager")
    model = model.eval()
    image_id = model.config.image_token_id
    prompts = [demo._encode_prompt(demo._answer_prompt(text, "en")) for text in questions.texts]
    answers: list[list[int]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(row)
    with torch.inference_mode():
        for rows in by_length.values():
            for start in range(0, len(rows), 256):
                part = rows[start : start + 256]
                ids = torch.tensor([[image_id] * 64 + prompts[row] for row in part])
                pictures = torch.from_numpy(normalize(questions.images[questions.image_index[part]], IMAGE_SPEC))
                out = model.generate(
                    input_ids=ids,
                    pixel_values=pictures,
                    attention_mask=torch.ones_like(ids),
                    token_type_ids=torch.zeros_like(ids),
                    max_new_tokens=4,
                    do_sample=False,
                )[:, ids.shape[1] :].tolist()
                for row, generated in zip(part, out, strict=True):
                    end = generated.index(1) + 1 if 1 in generated else len(generated)
                    answers[row] = generated[:end]
    return answers


def test_every_answer_on_the_test_split_equals_transformers(
    demo: Engine, test_split: easy_vqa_data.Questions, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded = [demo.encode_image(image) for image in test_split.images]
    pairs = [(encoded[picture], text) for picture, text in zip(test_split.image_index, test_split.texts, strict=True)]
    ours = demo.answer_batch(pairs, options=GenerateOptions(max_new_tokens=4))
    theirs = transformers_answers(test_split, demo)
    different = sum(list(answer.token_ids) != ids for answer, ids in zip(ours, theirs, strict=True))
    right = np.mean([answer.text == wanted for answer, wanted in zip(ours, test_split.answers, strict=True)])
    with capsys.disabled():
        print(
            f"\neasy-VQA test split: {len(ours)} questions, accuracy {right:.4%}, {different} answers differ from transformers"
        )
    assert len(ours) == 9673
    assert different == 0
    assert right >= 0.998


def test_captions_and_boxes_of_new_scenes_are_right(demo: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    """The targets of the demo model, on part of the scenes of docs/tasks.md's figures."""
    found = score_scenes(demo, 150)
    with capsys.disabled():
        print(f"\n150 scenes: captions {found['exact captions']:.1%}, mean IoU {found['mean IoU']:.3f}, F1 {found['F1']:.3f}")
    assert found["exact captions"] >= 0.9
    assert found["mean IoU"] >= 0.7
    assert found["F1"] >= 0.9


@pytest.mark.parametrize(("precision", "allowed_loss"), [("fp16", 0.0005), ("int8", 0.002), ("int4", 0.01)])
def test_precisions_cost_little_on_the_test_split(
    precision: str, allowed_loss: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fp32 bundle is right in all 9,673 questions."""
    export(str(DEMO_CHECKPOINT), tmp_path / "out", ExportOptions(precision))
    report = accuracy.measure(str(tmp_path / "out"))
    with capsys.disabled():
        print(f"\n{precision}: accuracy {report['accuracy']:.4%}, {report['megabytes']} MB")
    assert report["count"] == 9673
    assert report["accuracy"] >= 1 - allowed_loss


def test_the_bundle_was_exported_from_the_checkpoint_in_the_repository(demo: Engine) -> None:
    assert demo.manifest.parity is not None
    assert demo.manifest.parity["greedy_agreement"] == 1.0
    assert sha256_of(demo_bundle() / "tokenizer.json") == sha256_of(DEMO_CHECKPOINT / "tokenizer.json")
    assert sum(path.stat().st_size for path in demo_bundle().iterdir()) < 8 * 2**20


def test_the_exporter_still_writes_this_bundle(demo: Engine, tmp_path: Path) -> None:
    """A change of graphs or weights without a new embedded bundle must not go unseen."""
    manifest = export(str(DEMO_CHECKPOINT), tmp_path / "out", ExportOptions(languages=("en",)))
    assert manifest.files == demo.manifest.files
    assert dataclasses.replace(manifest, parity=demo.manifest.parity) == demo.manifest


def test_transformers_loads_the_checkpoint_folder_unchanged(demo: Engine) -> None:
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    assert AutoConfig.from_pretrained(DEMO_CHECKPOINT).model_type == "paligemma"
    assert AutoTokenizer.from_pretrained(DEMO_CHECKPOINT)("yes")["input_ids"] != [3]
    processor = AutoProcessor.from_pretrained(DEMO_CHECKPOINT)
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    out = processor(text="<image>answer en what color is the shape?", images=image, return_tensors="np")
    assert type(processor).__name__ == "PaliGemmaProcessor"
    # our layout and our pixels are those of the processor in this version
    raw = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
    prompt = demo._encode_prompt("answer en what color is the shape?")
    assert np.asarray(out["input_ids"])[0].tolist() == [raw["image_token_index"]] * 64 + prompt
    spec = demo.manifest.image
    np.testing.assert_allclose(np.asarray(out["pixel_values"]), to_pixel_values(open_image(image), spec), atol=1e-5)


def hand_drawn(shape: str, color: str, background: tuple[int, int, int]) -> Image.Image:
    """A wobbly shape, larger than the data set's pictures, antialiased, on another kind of background."""
    rng = np.random.default_rng(zlib.crc32(f"{shape} {color}".encode()))
    image = Image.new("RGB", (400, 400), background)
    draw = ImageDraw.Draw(image)
    corners = {
        "circle": [(210 + 80 * np.cos(t), 190 + 80 * np.sin(t)) for t in np.linspace(0, 6.28, 50)],
        "rectangle": [(130, 120), (280, 122), (279, 250), (131, 248)],
        "triangle": [(200, 110), (285, 260), (115, 260)],
    }[shape]
    draw.polygon([(x + rng.normal(0, 1), y + rng.normal(0, 1)) for x, y in corners], fill=color)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("shape", easy_vqa_data.SHAPES)
@pytest.mark.parametrize("color", ["red", "blue", "yellow", "black"])
def test_pictures_drawn_by_hand_are_answered_rightly(demo: Engine, shape: str, color: str) -> None:
    image = hand_drawn(shape, color, (250, 248, 242))
    wrong = "green" if color != "green" else "red"
    for question, wanted in (
        ("What color is the shape?", color),
        ("What shape is in the image?", shape),
        (f"Is there a {color} shape?", "yes"),
        (f"Is there a {wrong} shape in the image?", "no"),
        (f"Does the image contain a {shape}?", "yes"),
    ):
        answer = demo.answer(image, question)
        assert answer.text == wanted, question
        assert answer.confidence > 0.5


def test_the_shipped_picture_is_answered_rightly(demo: Engine) -> None:
    picture = demo_bundle().parent / "blue_circle.png"
    assert [demo.answer(picture, q).text for q in ("what color is the shape?", "what shape is present?")] == ["blue", "circle"]


def test_the_recipe_in_the_log_is_the_default_recipe() -> None:
    """docs/log.md names the recipe that made the bundle; changing a default without retraining must not go unseen."""
    from pgfast.train.presets import resolve

    assert resolve("tiny", {}).digest() in (TESTS.parent / "docs" / "log.md").read_text()
