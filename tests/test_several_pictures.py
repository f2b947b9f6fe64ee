"""Several pictures in front of one prompt, against transformers' processor and model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Fixed, Shape, make_checkpoint, random_pixels
from pgfast.export.build import export
from pgfast.export.plan import ExportOptions
from PIL import Image

import pgfast
from pgfast.bundle import Bundle
from pgfast.engine import Engine
from pgfast.errors import ExportError, InputError

TOKENS = 10


def picture(seed: int) -> Image.Image:
    return Image.fromarray(((random_pixels(seed, 40)[0].transpose(1, 2, 0) + 1) * 127).astype(np.uint8))


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    return make_checkpoint(folder, Shape(max_positions=512, gemma2=request.param == "paligemma2"))


@pytest.fixture(scope="module", params=["cpu", "tensorrt"])
def engine(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Both dialects, the standard one as TensorRT runs it: one session per shape."""
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    export(str(source), out, ExportOptions(target=request.param, max_images=4))
    if request.param == "cpu":
        with pgfast.load(out, provider="cpu") as engine:
            yield engine
    else:
        with Engine(Bundle.open(out), Fixed("cpu"), 1) as engine:
            yield engine


def of_transformers(source: Path, pictures: list[Image.Image], prompt: str) -> list[int]:
    """Greedy ids from transformers' own processor and generate."""
    import torch
    from transformers import (
        AutoTokenizer,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessorPil,
    )

    folder = str(source)
    preprocessing = json.loads((source / "preprocessor_config.json").read_text())
    images = SiglipImageProcessorPil(size=preprocessing["size"], image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3)
    images.image_seq_length = preprocessing["image_seq_length"] = (preprocessing["size"]["height"] // 8) ** 2
    processor = PaliGemmaProcessor(images, AutoTokenizer.from_pretrained(folder))
    model: Any = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its own labels, which nobody needs here
        inputs = processor(images=[pictures], text=[prompt], return_tensors="pt")
    inputs.pop("labels")
    with torch.inference_mode():
        made = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return [int(token) for token in made[0, inputs["input_ids"].shape[1] :]]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_all_image_tokens_come_first_as_in_transformers(engine: Engine, source: Path, count: int) -> None:
    pictures = [picture(seed) for seed in range(count)]
    expected = of_transformers(source, pictures, "answer en what color is the shape")
    found = engine.answer(pictures, "what color is the shape", options=pgfast.GenerateOptions(max_new_tokens=TOKENS))
    assert list(found.token_ids) == expected
    turned = engine.answer(pictures[::-1], "what color is the shape", options=pgfast.GenerateOptions(max_new_tokens=1))
    assert count == 1 or turned.token_logprobs[0] != pytest.approx(found.token_logprobs[0], rel=1e-5)


def test_prompts_of_one_and_of_several_pictures_share_the_running_batch(engine: Engine) -> None:
    options = pgfast.GenerateOptions(max_new_tokens=TOKENS)
    asked: list[Any] = [picture(0), [picture(1), picture(2)], [picture(3)], [picture(0), picture(1), picture(2)], picture(2)]
    alone = [engine.generate(images, "what shape", options=options).token_ids for images in asked]
    together = engine.answer_batch([(images, "what shape") for images in asked], options=options)
    again = engine.answer_batch([(images, "what shape") for images in asked], options=options)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in again]
    pending = [engine.submit(images, prompt="what shape", options=options) for images in asked]
    assert [one.result().token_ids for one in pending] == alone


def test_encoded_pictures_can_be_joined_and_asked_again(engine: Engine) -> None:
    first, second = picture(0), picture(1)
    both = engine.encode_image([first, second])
    expected = engine.generate([first, second], "what").token_ids
    assert both.image_features.shape[1] == 2 * engine.manifest.dimensions.num_image_tokens
    assert engine.generate(both, "what").token_ids == expected
    assert engine.generate([engine.encode_image(first), second], "what").token_ids == expected
    assert engine.answer(both, "what").timings.vision == 0


@pytest.mark.parametrize("count", [0, 5])
def test_too_many_pictures_and_none_are_refused(engine: Engine, count: int) -> None:
    with pytest.raises(InputError, match=f"{count} pictures for one prompt: this bundle takes 1 to 4"):
        engine.answer([picture(0)] * count, "what")
    both = engine.encode_image([picture(0)] * 3)
    with pytest.raises(InputError, match="6 pictures for one prompt"):
        engine.answer([both, both], "what")


def test_how_many_pictures_a_bundle_takes(source: Path, tmp_path: Path) -> None:
    manifest = export(str(source), tmp_path / "bundle", ExportOptions())
    assert manifest.limits.images == 8
    assert manifest.cache_length == 8 * 16 + 2 * 128
    with pytest.raises(ExportError, match="enough for 1 to 16 pictures"):
        export(str(source), tmp_path / "more", ExportOptions(max_images=17))
    with pytest.raises(ExportError, match="built for one picture"):
        export(str(source), tmp_path / "engines", ExportOptions(precision="fp16", target="tensorrt-rtx", max_images=2))
