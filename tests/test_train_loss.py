"""The training step against transformers: loss, masks, batches, gradients, features, greedy answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Shape, make_checkpoint
from pgfast.train.answer_model import AnswerModel, batch_tensors, greedy
from pgfast.train.sequence import Batch, Example, collate, loss_weights
from transformers import PaliGemmaForConditionalGeneration

EXAMPLES = [Example([2, 7, 5, 4], [10, 1]), Example([2, 8, 9, 12, 13, 4], [11, 12, 13, 1]), Example([2, 8, 4], [9, 1])]
PICTURE_OF = np.array([1, 0, 1])
PATCHES = 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gemma2"), Shape(gemma2=True))


# transformers has no sdpa for Gemma 2
@pytest.fixture(params=["paligemma eager", "paligemma sdpa", "paligemma2 eager"])
def hf(request: pytest.FixtureRequest, checkpoint: Path, gemma2: Path) -> Any:
    family, attention = request.param.split()
    folder = checkpoint if family == "paligemma" else gemma2
    return PaliGemmaForConditionalGeneration.from_pretrained(folder, attn_implementation=attention).eval()


@pytest.fixture
def eager(checkpoint: Path) -> Any:
    return PaliGemmaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager").eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))


def ours(hf: Any, **frozen: bool) -> AnswerModel:
    return AnswerModel(hf, **{"vision_frozen": False, "projector_frozen": False, **frozen})


def make_batch(hf: Any, examples: list[Example]) -> Batch:
    return collate(examples, image_token_id=hf.config.image_token_id, num_image_tokens=PATCHES, pad_token_id=0)


def inputs_of(hf: Any, example: Example, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What transformers wants for one example: its own mask is made from token_type_ids and labels."""
    ids = torch.tensor([[hf.config.image_token_id] * PATCHES + [*example.prefix, *example.suffix]])
    types = torch.zeros_like(ids)
    types[:, PATCHES + len(example.prefix) :] = 1
    return {
        "input_ids": ids,
        "pixel_values": pixels[None],
        "token_type_ids": types,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(types == 1, ids, -100),
    }


def transformers_loss(hf: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Mean over all answer tokens, one example at a time."""
    total, count = torch.zeros(()), 0
    for example, picture in zip(EXAMPLES, PICTURE_OF, strict=True):
        loss = hf(**inputs_of(hf, example, pixels[picture])).loss
        total, count = total + loss * len(example.suffix), count + len(example.suffix)
    return total / count


def our_loss(model: AnswerModel, hf: Any, pixels: torch.Tensor) -> torch.Tensor:
    batch = make_batch(hf, EXAMPLES)
    losses = model(**batch_tensors(batch, PICTURE_OF, CPU), pixel_values=pixels)
    weights = loss_weights(batch, "token", sum(len(e.suffix) for e in EXAMPLES))
    return (losses * torch.from_numpy(weights)).sum()


def test_the_loss_and_every_gradient_equal_transformers(hf: Any, pixels: torch.Tensor) -> None:
    transformers_loss(hf, pixels).backward()
    wanted = {name: parameter.grad.clone() for name, parameter in hf.named_parameters() if parameter.grad is not None}
    hf.zero_grad()
    loss = our_loss(ours(hf), hf, pixels)
    loss.backward()
    with torch.inference_mode():
        assert float(loss) == pytest.approx(float(transformers_loss(hf, pixels)), rel=1e-6)
    got = {name: parameter.grad for name, parameter in hf.named_parameters() if parameter.grad is not None}
    assert set(got) == set(wanted)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6 * float(wanted[name].abs().max() + 1), msg=name)


def test_the_head_on_answers_alone_gives_the_full_heads_loss(hf: Any, pixels: torch.Tensor) -> None:
    """transformers' hidden states, the whole vocabulary at every position, cross entropy that ignores the rest."""
    example = EXAMPLES[1]
    inputs = inputs_of(hf, example, pixels[0])
    with torch.inference_mode():
        logits = hf(**inputs).logits[:, :-1].float()
        full = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), inputs["labels"][:, 1:].reshape(-1))
        batch = make_batch(hf, [example])
        alone = ours(hf)(**batch_tensors(batch, np.array([0]), CPU), pixel_values=pixels[:1]).mean()
    assert float(alone) == pytest.approx(float(full), rel=1e-6)


def test_a_batch_is_its_rows_one_by_one(hf: Any, pixels: torch.Tensor) -> None:
    model = ours(hf)
    with torch.inference_mode():
        together = model(**batch_tensors(make_batch(hf, EXAMPLES), PICTURE_OF, CPU), pixel_values=pixels)
        parts = [
            model(**batch_tensors(make_batch(hf, [e]), np.array([0]), CPU), pixel_values=pixels[[p]])
            for e, p in zip(EXAMPLES, PICTURE_OF, strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(parts), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_an_answer_token_changes_nothing_before_it(hf: Any, pixels: torch.Tensor, changed: int) -> None:
    model, example = ours(hf), EXAMPLES[1]
    suffix = [*example.suffix]
    suffix[changed] = 15

    def logits(answer: list[int]) -> torch.Tensor:
        tensors = batch_tensors(make_batch(hf, [Example(example.prefix, answer)]), np.array([0]), CPU)
        tensors.pop("labels")
        with torch.inference_mode():
            return model(**tensors, pixel_values=pixels[:1])

    before, after = logits([*example.suffix]), logits(suffix)
    # position i predicts token i: it sees the answer up to token i - 1
    assert torch.equal(before[: changed + 1], after[: changed + 1])
    assert not torch.allclose(before[changed + 1 :], after[changed + 1 :])


def test_a_prompt_token_changes_everything(hf: Any, pixels: torch.Tensor) -> None:
    """The prompt attends to itself in both directions: its last token reaches its first position."""
    model = ours(hf)
    with torch.inference_mode():
        ids = [torch.tensor([[2, 8, 9, last, 4]]) for last in (12, 13)]
        size = PATCHES + 5
        mask = torch.ones((1, size, size), dtype=torch.bool)
        where = torch.zeros((1, size), dtype=torch.bool)
        where[:, 0] = True  # the first image position
        a, b = (model(i, mask, where, pixel_values=pixels[:1], image_index=torch.tensor([0])) for i in ids)
    assert not torch.allclose(a, b)


def test_example_weights_give_the_mean_of_row_means(eager: Any, pixels: torch.Tensor) -> None:
    batch = make_batch(eager, EXAMPLES)
    with torch.inference_mode():
        losses = ours(eager)(**batch_tensors(batch, PICTURE_OF, CPU), pixel_values=pixels)
    weights = torch.from_numpy(loss_weights(batch, "example", len(EXAMPLES)))
    rows = losses.split([len(e.suffix) for e in EXAMPLES])
    assert float((losses * weights).sum()) == pytest.approx(float(torch.stack([row.mean() for row in rows]).mean()), rel=1e-6)


def test_features_instead_of_pixels_change_nothing(eager: Any, pixels: torch.Tensor) -> None:
    model = ours(eager, vision_frozen=True)
    tensors = batch_tensors(make_batch(eager, EXAMPLES), PICTURE_OF, CPU)
    from_pixels = model(**tensors, pixel_values=pixels)
    hidden = model.model.model.vision_tower(pixels).last_hidden_state.detach()
    assert torch.equal(from_pixels, model(**tensors, image_hidden=hidden))
    from_pixels.sum().backward()
    assert all(p.grad is None for p in model.model.model.vision_tower.parameters())
    assert all(p.grad is not None for p in model.model.model.multi_modal_projector.parameters())


def test_a_frozen_projector_gets_no_gradients(eager: Any, pixels: torch.Tensor) -> None:
    model = ours(eager, vision_frozen=True, projector_frozen=True)
    model(**batch_tensors(make_batch(eager, EXAMPLES), PICTURE_OF, CPU), pixel_values=pixels).sum().backward()
    assert all(p.grad is None for p in model.model.model.multi_modal_projector.parameters())
    assert all(p.grad is not None for p in model.model.model.language_model.parameters())


def test_gradient_checkpointing_changes_no_gradient(eager: Any, pixels: torch.Tensor) -> None:
    eager.train()
    model = ours(eager)
    our_loss(model, eager, pixels).backward()
    wanted = {name: p.grad.clone() for name, p in eager.named_parameters()}
    eager.zero_grad()
    eager.activation_checkpointing_enable({"use_reentrant": False})
    our_loss(model, eager, pixels).backward()
    for name, parameter in eager.named_parameters():
        assert torch.equal(parameter.grad, wanted[name]), name


def test_many_answer_positions_meet_the_head_in_parts(
    eager: Any, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = our_loss(ours(eager), eager, pixels).detach()
    monkeypatch.setattr("pgfast.train.answer_model.HEAD_CHUNK", 3)
    assert float(our_loss(ours(eager), eager, pixels).detach()) == pytest.approx(float(whole), rel=1e-6)


def test_greedy_answers_are_those_of_transformers_generate(hf: Any, pixels: torch.Tensor) -> None:
    prompts = [[2, 7, 5, 9, 4], [2, 8, 9, 12, 4]]
    model = ours(hf)
    with torch.inference_mode():
        hidden = hf.model.vision_tower(pixels).last_hidden_state
        answers = greedy(model, hidden, prompts, eos_id=1, max_new_tokens=12)
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([[hf.config.image_token_id] * PATCHES + prompt])
            out = hf.generate(
                input_ids=ids,
                pixel_values=pixels[row : row + 1],
                attention_mask=torch.ones_like(ids),
                token_type_ids=torch.zeros_like(ids),
                max_new_tokens=12,
                do_sample=False,
            )[0, ids.shape[1] :].tolist()
            wanted = out[: out.index(1)] if 1 in out else out
            assert answers[row] == wanted
