"""Beam search and the repetition penalty, against transformers' own generate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Shape, make_bundle, make_checkpoint, random_pixels

import pgfast
from pgfast import GenerateOptions
from pgfast.engine import Engine
from pgfast.errors import InputError
from pgfast.image import open_image, to_pixel_values

PROMPTS = ["what color is the shape", "answer en yes", "a picture"]
TOKENS = 8


def picture(seed: int) -> np.ndarray:
    return ((random_pixels(seed, 40)[0].transpose(1, 2, 0) + 1) * 127).astype(np.uint8)


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose end token is a near rival of tokens that are often chosen, so that many searches end early."""
    from safetensors.numpy import load_file, save_file

    folder = make_checkpoint(
        tmp_path_factory.mktemp("beams"), Shape(seed=3, gemma2=request.param == "paligemma2", final_cap=30.0)
    )
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    with pgfast.load(make_bundle(folder, folder / "before"), provider="cpu") as before:
        options = GenerateOptions(max_new_tokens=TOKENS)
        made = [before.generate(picture(seed), prompt, options=options).token_ids for seed, prompt in enumerate(PROMPTS)]
    table = tensors[name].copy()
    table[1] = 1.03 * table[[ids[3] for ids in made]].mean(axis=0)
    tensors[name] = table
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def engine(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pgfast.load(make_bundle(source, tmp_path_factory.mktemp("bundle") / "bundle"), provider="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(source: Path) -> Any:
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    model: Any = PaliGemmaForConditionalGeneration
    return model.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()


def of_transformers(reference: Any, engine: Engine, seed: int, prompt: str, **settings: Any) -> tuple[list[int], float]:
    """Ids up to the end token and, with beams, the sequence's score."""
    import torch

    ids = torch.tensor([[engine.manifest.tokens.image] * 16 + engine._encode_prompt(prompt)])
    pixels = torch.from_numpy(to_pixel_values(open_image(picture(seed)), engine.manifest.image))
    with torch.inference_mode():
        out = reference.generate(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
    made = out.sequences[0, ids.shape[1] :].tolist()
    score = float(out.sequences_scores[0]) if settings.get("num_beams", 1) > 1 else 0.0
    return made[: made.index(1) + 1] if 1 in made else made, score


@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
def test_beams_are_those_of_transformers(engine: Engine, reference: Any, beams: int, length_penalty: float) -> None:
    ended = 0
    for seed, prompt in enumerate(PROMPTS):
        expected, score = of_transformers(
            reference, engine, seed, prompt, num_beams=beams, length_penalty=length_penalty, early_stopping=False
        )
        options = GenerateOptions(max_new_tokens=TOKENS, beams=beams, length_penalty=length_penalty)
        found = engine.submit(picture(seed), prompt=prompt, options=options)
        answer = found.result()
        assert list(answer.token_ids) == expected
        assert found._row.score == pytest.approx(score, abs=1e-4)  # type: ignore[union-attr]
        total = sum(answer.token_logprobs)
        assert total / len(answer.token_ids) ** length_penalty == pytest.approx(score, abs=1e-4)
        assert (answer.finish_reason == "stop") == (expected[-1] == 1)
        ended += expected[-1] == 1
    assert ended or length_penalty != 0  # shorter texts win then


def test_more_beams_find_no_less_probable_texts(engine: Engine) -> None:
    options = {beams: GenerateOptions(max_new_tokens=4, beams=beams, length_penalty=0.0) for beams in (1, 16)}
    better = 0
    for seed, prompt in enumerate(PROMPTS):
        greedy, searched = (engine.generate(picture(seed), prompt, options=options[beams]) for beams in (1, 16))
        assert searched.confidence >= greedy.confidence * (1 - 1e-6)
        better += searched.confidence > greedy.confidence * 1.01
    assert better


@pytest.mark.parametrize("penalty", [1.3, 0.7])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_repetition_penalty_is_that_of_transformers(engine: Engine, reference: Any, penalty: float, beams: int) -> None:
    for seed, prompt in enumerate(PROMPTS):
        expected, _ = of_transformers(reference, engine, seed, prompt, num_beams=beams, repetition_penalty=penalty)
        options = GenerateOptions(max_new_tokens=TOKENS, repetition_penalty=penalty, beams=beams)
        assert list(engine.generate(picture(seed), prompt, options=options).token_ids) == expected


def test_searches_share_the_running_batch_with_others(engine: Engine) -> None:
    """More than fit at a time, of several widths, between plain and sampled questions and choices; results as alone."""
    kinds = [
        GenerateOptions(max_new_tokens=TOKENS, beams=5),
        GenerateOptions(max_new_tokens=3),
        GenerateOptions(max_new_tokens=TOKENS, beams=16),
        GenerateOptions(max_new_tokens=TOKENS, temperature=1.0, seed=5),
        GenerateOptions(max_new_tokens=TOKENS, beams=3, stop=("e",)),
    ]
    asked = [(seed % 3, PROMPTS[seed % 3], kinds[seed % 5]) for seed in range(20)]
    alone = [engine.generate(picture(seed), prompt, options=options) for seed, prompt, options in asked]
    pending = [engine.submit(picture(seed), prompt=prompt, options=options) for seed, prompt, options in asked]
    for one, expected in zip(pending, alone, strict=True):
        assert one.result(60).token_ids == expected.token_ids
    for one in [engine.submit(picture(0), prompt=PROMPTS[0], options=kinds[2]) for _ in range(3)]:
        one.cancel()
    assert engine.generate(picture(0), PROMPTS[0], options=kinds[0]).token_ids == alone[0].token_ids
    assert engine.load_figures().running == 0


def test_what_does_not_go_with_beams_is_refused(engine: Engine) -> None:
    for options, message in (
        (GenerateOptions(beams=17), "beams is 17: this engine has room for 16"),
        (GenerateOptions(beams=0), "beams is 0"),
        (GenerateOptions(beams=2, temperature=1.0), "leave temperature away"),
        (GenerateOptions(repetition_penalty=0.0), "repetition_penalty is 0.0"),
        (GenerateOptions(length_penalty=float("nan")), "length_penalty is nan"),
    ):
        with pytest.raises(InputError, match=message):
            engine.generate(picture(0), "what", options=options)
    with pytest.raises(InputError, match="do not stream"):
        next(engine.stream(picture(0), "what", options=GenerateOptions(beams=2)))
