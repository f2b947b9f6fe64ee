"""Cache, mask and batches: what the decoder sees at each position."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import Shape, make_bundle, make_checkpoint, open_model, random_pixels
from pgfast.export.verify import TransformersReference, relative_error

from pgfast.runtime.decoder import Decoder
from pgfast.runtime.model import Model
from pgfast.runtime.providers import Target


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
        model.decoder.step(1, np.array([tokens[length - 1]]))
        wanted = reference.logits(pixels, PROMPT, tokens[:length])
        assert relative_error(model.decoder.logits(0), wanted) < 1e-4, length


@pytest.mark.parametrize("length", [1, 2, 5, 16, 17, 31, 40])
def test_prompts_of_every_length_equal_transformers(length: int, bundle: Path, reference: TransformersReference) -> None:
    opened, model = open_model(bundle)
    pixels = random_pixels(4, opened.manifest.image.size)
    prompt = [2, *np.random.default_rng(length).integers(5, 1000, length).tolist()]
    model.decoder.prompt(model.encode(pixels), [prompt])
    assert relative_error(model.decoder.logits(0), reference.logits(pixels, prompt)) < 1e-4


def test_rows_of_different_lengths_equal_each_row_alone(bundle: Path) -> None:
    opened, model = open_model(bundle)
    rng = np.random.default_rng(5)
    prompts = [[2, *rng.integers(5, 1000, n).tolist(), 4] for n in (3, 17, 1, 9)]
    features = np.concatenate([model.encode(random_pixels(i, opened.manifest.image.size)) for i in range(4)])

    def run(rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        chosen = model.decoder.prompt(features[rows], [prompts[row] for row in rows])
        tokens, logits = [], []
        for _ in range(12):
            tokens.append(chosen.tokens[0])
            logits.append(np.stack([model.decoder.logits(row) for row in range(len(rows))]))
            chosen = model.decoder.step(len(rows))
        return np.stack(tokens, axis=1), np.stack(logits, axis=1)

    tokens, logits = run([0, 1, 2, 3])
    for row in range(4):
        alone_tokens, alone_logits = run([row])
        np.testing.assert_array_equal(tokens[row], alone_tokens[0])
        assert relative_error(logits[row], alone_logits[0]) < 1e-5


def decode_alone(model: Model, features: np.ndarray, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """The first tokens of one sequence in slot 0 of an otherwise empty cache, and their log-probabilities."""
    for row in range(model.decoder.slots):
        model.decoder.release(row)
    chosen = [model.decoder.prompt(features, [prompt])]
    chosen += [model.decoder.step(1) for _ in range(count - 1)]
    return [int(c.tokens[0, 0]) for c in chosen], [float(c.logprobs[0, 0]) for c in chosen]


def test_a_newcomer_joins_any_slot_and_leaves_the_others_alone(bundle: Path) -> None:
    """Slots 1, 4-5 and 2 begin at different steps; 0 and 3 stay free and are computed along."""
    opened, model = open_model(bundle)
    rng = np.random.default_rng(6)
    prompts = {slot: [2, *rng.integers(5, 1000, n).tolist(), 4] for slot, n in ((1, 3), (4, 17), (5, 1), (2, 9))}
    features = {slot: model.encode(random_pixels(slot, opened.manifest.image.size)) for slot in prompts}
    wanted = {slot: decode_alone(model, features[slot], prompts[slot], 10) for slot in prompts}
    decoder = model.decoder
    decoder.release(0)
    found: dict[int, list[tuple[int, float]]] = {slot: [] for slot in prompts}
    for step in range(12):
        for when, first, count in ((0, 1, 1), (3, 4, 2), (5, 2, 1)):
            if step == when:
                group = range(first, first + count)
                chosen = decoder.prompt(np.concatenate([features[s] for s in group]), [prompts[s] for s in group], first)
                for i, slot in enumerate(group):
                    found[slot].append((int(chosen.tokens[0, i]), float(chosen.logprobs[0, i])))
        before = {slot for slot in found if decoder.length(slot)}
        chosen = decoder.step(6)
        for slot in before:
            found[slot].append((int(chosen.tokens[0, slot]), float(chosen.logprobs[0, slot])))
    for slot, (tokens, logprobs) in wanted.items():
        count = min(10, len(found[slot]))
        assert count >= 7
        assert [token for token, _ in found[slot][:count]] == tokens[:count]
        assert [logprob for _, logprob in found[slot][:count]] == pytest.approx(logprobs[:count], abs=1e-5)
    assert decoder.length(0) == decoder.length(3) == 0


def test_a_burst_equals_single_steps_and_a_rewound_slot_goes_on_from_there(bundle: Path) -> None:
    opened, model = open_model(bundle)
    features, decoder = model.encode(random_pixels(8, opened.manifest.image.size)), model.decoder
    tokens, logprobs = decode_alone(model, features, PROMPT, 8)
    decoder.prompt(features, [PROMPT])
    length = decoder.length(0)
    burst = decoder.step(1, burst=7)
    assert burst.tokens[:, 0].tolist() == tokens[1:]
    np.testing.assert_allclose(burst.logprobs[:, 0], logprobs[1:], atol=1e-6)
    assert decoder.length(0) == length + 7
    decoder.rewind(0, length + 2)
    again = decoder.step(1, np.array(tokens[2:3]), burst=5)
    assert again.tokens[:, 0].tolist() == tokens[3:]


def test_slots_that_nobody_uses_cost_no_memory(checkpoint: Path, tmp_path: Path) -> None:
    """The cache is far larger than what one prompt touches."""
    opened, model = open_model(make_bundle(checkpoint, tmp_path / "bundle"))
    decoder = Decoder(opened.manifest, Target("cpu"), lambda shapes: model._session("decoder", None), slots=20_000)
    features = model.encode(random_pixels(1, opened.manifest.image.size))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    decoder.prompt(features, [PROMPT])
    reserved = sum(cache._host.nbytes for cache in decoder._caches.values())  # type: ignore[union-attr]
    assert reserved > 2**29
    assert resident() - before < reserved / 10


def caches(bundle: Path, prompt: list[int], generated: list[int]) -> np.ndarray:
    """Keys of the second layer, [K, T, H]: they are made from the first layer's hidden states."""
    opened, model = open_model(bundle)
    model.decoder.prompt(model.encode(random_pixels(6, opened.manifest.image.size)), [prompt])
    for token in generated:
        model.decoder.step(1, np.array([token]))
    return model.decoder._caches["1.key"].read()[0].copy()


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
