"""Cache, mask and batches: what the decoder sees at each position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Shape, make_bundle, make_checkpoint, open_model, random_pixels
from pgfast.export.verify import TransformersReference, relative_error


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both families, in place of the one checkpoint of the other tests."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), Shape(gemma2=request.param == "paligemma2"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> TransformersReference:
    return TransformersReference(checkpoint)


@pytest.fixture(scope="module", params=["ort", "standard"])
def bundle(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(checkpoint, tmp_path_factory.mktemp("bundle") / request.param, dialect=request.param)


PROMPT = [2, 7, 5, 12, 9, 4]


def test_decoding_with_the_cache_equals_recomputing_at_every_length(bundle: Path, reference: TransformersReference) -> None:
    opened, model = open_model(bundle)
    pixels = random_pixels(3, opened.manifest.image.size)
    model.decoder.prompt(model.encode(pixels), [PROMPT])
    tokens = np.random.default_rng(0).integers(5, 1000, 40).tolist()
    for length in range(1, 41):
        model.decoder.step(np.array([tokens[length - 1]]))
        wanted = reference.logits(pixels, PROMPT, tokens[:length])
        assert relative_error(model.decoder.logits[0], wanted) < 1e-4, length


@pytest.mark.parametrize("length", [1, 2, 5, 16, 17, 31, 40])
def test_prompts_of_every_length_equal_transformers(length: int, bundle: Path, reference: TransformersReference) -> None:
    opened, model = open_model(bundle)
    pixels = random_pixels(4, opened.manifest.image.size)
    prompt = [2, *np.random.default_rng(length).integers(5, 1000, length).tolist()]
    model.decoder.prompt(model.encode(pixels), [prompt])
    assert relative_error(model.decoder.logits[0], reference.logits(pixels, prompt)) < 1e-4


def test_rows_of_different_lengths_equal_each_row_alone(bundle: Path) -> None:
    opened, model = open_model(bundle)
    rng = np.random.default_rng(5)
    prompts = [[2, *rng.integers(5, 1000, n).tolist(), 4] for n in (3, 17, 1, 9)]
    features = np.concatenate([model.encode(random_pixels(i, opened.manifest.image.size)) for i in range(4)])

    def run(rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        model.decoder.prompt(features[rows], [prompts[row] for row in rows])
        tokens, logits = [], []
        for _ in range(12):
            tokens.append(model.decoder.next_token.copy())
            logits.append(model.decoder.logits.copy())
            model.decoder.step()
        return np.stack(tokens, axis=1), np.stack(logits, axis=1)

    tokens, logits = run([0, 1, 2, 3])
    for row in range(4):
        alone_tokens, alone_logits = run([row])
        np.testing.assert_array_equal(tokens[row], alone_tokens[0])
        assert relative_error(logits[row], alone_logits[0]) < 1e-5


def caches(bundle: Path, prompt: list[int], generated: list[int]) -> np.ndarray:
    """Keys of the second layer, [K, T, H]: they are made from the first layer's hidden states."""
    opened, model = open_model(bundle)
    model.decoder.prompt(model.encode(random_pixels(6, opened.manifest.image.size)), [prompt])
    for token in generated:
        model.decoder.step(np.array([token]))
    return model.decoder._caches["1.key"].numpy()[0].copy()


def test_the_first_position_sees_the_last_prompt_token(bundle: Path) -> None:
    """Prefix-LM: image and prompt attend to each other in both directions."""
    first = caches(bundle, [*PROMPT[:-1], 4], [])[:, 0]
    other = caches(bundle, [*PROMPT[:-1], 11], [])[:, 0]
    assert np.abs(first - other).max() > 1e-3


def test_a_generated_token_changes_nothing_before_it(bundle: Path) -> None:
    """The answer is causal."""
    first, other = caches(bundle, PROMPT, [10, 20, 30]), caches(bundle, PROMPT, [10, 21, 30])
    second = 16 + len(PROMPT) + 1  # slot of the second generated token, behind 16 image tokens
    np.testing.assert_array_equal(first[:, :second], other[:, :second])
    assert np.abs(first[:, second] - other[:, second]).max() > 1e-3
    assert np.abs(first[:, second + 1] - other[:, second + 1]).max() > 1e-4
