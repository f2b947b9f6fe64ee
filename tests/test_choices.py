"""Log-probabilities of answers and choices against transformers' hidden states; head, softcap and softmax are done here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Shape, make_bundle, make_checkpoint, random_pixels
from memory_dataset import Memory, one
from pgfast.export.verify import TransformersReference
from pgfast.train.evaluation.answering import answer_with_bundle, answer_with_checkpoint
from pgfast.train.evaluation.transformers_model import load_checkpoint
from safetensors.numpy import load_file, save_file

import pgfast
from pgfast import GenerateOptions
from pgfast.engine import Engine
from pgfast.errors import InputError
from pgfast.image import open_image, to_pixel_values
from pgfast.pending import Pending
from pgfast.runtime.generation import ChoiceScores

CAP = 30.0
QUESTION = "what color is the shape?"
# the first three are each the beginning of the next
CHOICES = ["yes", "yes no", "yes no red", "no", "blue green ?"]
NORM = "model.language_model.norm.weight"


class Reference:
    """Full log-probabilities of a continuation in one run, from the last hidden states."""

    def __init__(self, checkpoint: Path, cap: float | None) -> None:
        self.model, self.cap, self.checkpoint = TransformersReference(checkpoint)._model, cap, checkpoint

    def logprobs(self, pixels: np.ndarray, prompt: list[int], suffix: tuple[int, ...], *, capped: bool = True) -> np.ndarray:
        """float64 [len(suffix)]."""
        import torch

        base = self.model.model
        with torch.inference_mode():
            features = base.get_image_features(torch.from_numpy(pixels)).pooler_output
            text = base.get_input_embeddings()(torch.tensor([[*prompt, *suffix]]))
            embeds = torch.cat([features, text], dim=1)
            types = torch.zeros(embeds.shape[:2], dtype=torch.long)
            types[:, embeds.shape[1] - len(suffix) :] = 1
            out = base(
                inputs_embeds=embeds,
                token_type_ids=types,
                attention_mask=torch.ones_like(types),
                position_ids=torch.arange(1, embeds.shape[1] + 1)[None],
                use_cache=False,
            )
            hidden = out.last_hidden_state[0, -len(suffix) - 1 : -1].double().numpy()  # [len(suffix), D]
            logits = hidden @ self.model.lm_head.weight.double().numpy().T
        if self.cap is not None and capped:
            logits = self.cap * np.tanh(logits / self.cap)
        logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        found: np.ndarray = logits[np.arange(len(suffix)), list(suffix)]
        return found


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Reference]:
    """An engine and its reference; with logits in the tens, so that the published cap of 30 shows."""
    gemma2 = request.param == "paligemma2"
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(folder / "checkpoint", Shape(seed=3, gemma2=gemma2, attn_cap=50.0, final_cap=CAP))
    weights = load_file(checkpoint / "model.safetensors")
    name = next(name for name in weights if name.endswith("language_model.model.norm.weight") or name == NORM)
    weights[name] = (1 + weights[name]) * np.float32(8) - 1
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    bundle = make_bundle(checkpoint, folder / "bundle")
    return pgfast.load(bundle, provider="cpu", threads=1), Reference(checkpoint, CAP if gemma2 else None)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return ((random_pixels(4, 40)[0].transpose(1, 2, 0) + 1) * 127).astype(np.uint8)


def asked(engine: Engine, image: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Pixels and prompt of `QUESTION`, for the reference."""
    return to_pixel_values(open_image(image), engine.manifest.image), engine._encode_prompt(f"answer en {QUESTION}")


def ids_of(engine: Engine, choice: str) -> tuple[int, ...]:
    return (*engine._tokenizer.encode_suffix(choice), engine.manifest.tokens.eos)


def test_every_token_of_every_choice_is_scored_exactly(pair: tuple[Engine, Reference], image: np.ndarray) -> None:
    engine, reference = pair
    pixels, prompt = asked(engine, image)
    together, totals = engine.answer(image, QUESTION, choices=CHOICES), []
    for choice in CHOICES:
        wanted = reference.logprobs(pixels, prompt, ids_of(engine, choice))
        alone = engine.answer(image, QUESTION, choices=[choice])
        assert alone.token_ids == ids_of(engine, choice)
        np.testing.assert_allclose(alone.token_logprobs, wanted, atol=2e-3)
        assert alone.choices == {choice: 1.0}
        totals.append(float(wanted.sum()))
    shares = np.exp(np.array(totals) - np.logaddexp.reduce(totals))
    assert together.choices is not None
    assert list(together.choices) == CHOICES
    np.testing.assert_allclose(list(together.choices.values()), shares, rtol=1e-2)
    best = int(np.argmax(totals))
    assert together.text == CHOICES[best]
    assert np.log(together.confidence) == pytest.approx(totals[best], abs=5e-3)
    turned = engine.answer(image, QUESTION, choices=CHOICES[::-1])
    assert turned.choices == pytest.approx(together.choices)
    assert turned.text == together.text


@pytest.mark.parametrize("options", [GenerateOptions(max_new_tokens=10), GenerateOptions(10, temperature=3.0, top_k=9, seed=2)])
def test_token_logprobs_are_those_of_the_full_softmax(
    pair: tuple[Engine, Reference], image: np.ndarray, options: GenerateOptions
) -> None:
    """Whatever the temperature; and the cap counts."""
    engine, reference = pair
    pixels, prompt = asked(engine, image)
    answer = engine.answer(image, QUESTION, options=options)
    wanted = reference.logprobs(pixels, prompt, answer.token_ids)
    np.testing.assert_allclose(answer.token_logprobs, wanted, atol=2e-3)
    assert np.log(answer.confidence) == pytest.approx(wanted.sum(), abs=1e-2)
    if reference.cap is not None and options.temperature:
        uncapped = reference.logprobs(pixels, prompt, answer.token_ids, capped=False)
        assert np.abs(uncapped - wanted).max() > 0.1


def test_the_evaluation_of_a_checkpoint_has_the_same_confidences(pair: tuple[Engine, Reference], image: np.ndarray) -> None:
    """Whether this version of transformers caps the logits or not."""
    engine, reference = pair
    data = Memory([one(i, "x", text) for i, text in enumerate((QUESTION, "red", "is there a circle?"))], {"x": image})
    model = load_checkpoint(str(reference.checkpoint), device="cpu")
    assert getattr(model.model.config.get_text_config(), "final_logit_softcapping", None) is None
    ours, theirs = answer_with_bundle(engine, data).predictions, answer_with_checkpoint(model, data).predictions
    for row, found in theirs.items():
        assert found.text == ours[row].text
        assert found.confidence == pytest.approx(ours[row].confidence, rel=2e-2)


def test_choices_too_long_for_a_probability_still_have_shares(pair: tuple[Engine, Reference], image: np.ndarray) -> None:
    """Each has one of less than 1e-308, which is 0 in any float."""
    engine, reference = pair
    pixels, prompt = asked(engine, image)
    choices = ["red blue green " * 26 + end for end in ("yes", "no", "circle")]
    answer = engine.answer(image, QUESTION, choices=choices)
    totals = [reference.logprobs(pixels, prompt, ids_of(engine, choice)).sum() for choice in choices]
    assert max(totals) < -750
    assert answer.confidence == 0
    assert answer.choices is not None
    assert sum(answer.choices.values()) == pytest.approx(1)
    shares = np.exp(np.array(totals) - np.logaddexp.reduce(totals))
    np.testing.assert_allclose(list(answer.choices.values()), shares, rtol=2e-2, atol=1e-9)


def test_the_first_of_equal_choices_wins() -> None:
    scores = [[-2.0, -0.5], [-1.0, -2.0], [-1.5, -1.0], [-0.5, -2.0]]  # the second is worse, the others are equal
    ticket: Any = SimpleNamespace(wait=lambda timeout: None, begun=0.0, first_token=0.0, ended=0.0)
    for names, order in ((["a", "b", "c", "d"], [0, 1, 2, 3]), (["d", "c", "b", "a"], [3, 2, 1, 0])):
        row = ChoiceScores([[10 + i, 1] for i in order])
        row.scores = [scores[i] for i in order]
        tokenizer: Any = None
        answer = Pending(row, ticket, tokenizer, GenerateOptions(), names, 0.0, 0.0, 0.0, None).result()
        assert answer.text == names[0]
        assert answer.choices is not None
        assert answer.choices["a"] == answer.choices["c"] == answer.choices["d"] > answer.choices["b"]


def test_choices_that_are_the_same_to_the_model_are_refused(demo: Engine, picture: np.ndarray) -> None:
    for choices in (["blue", "blue"], ["blue", " blue\n"], ["blue", "Blue"]):
        with pytest.raises(InputError, match="cannot tell the choices"):
            demo.answer(picture, QUESTION, choices=choices)
    padded = demo.answer(picture, QUESTION, choices=[" blue ", "red"])
    assert padded.text == " blue "  # as it was given
    assert padded.confidence == demo.answer(picture, QUESTION, choices=["blue", "red"]).confidence
