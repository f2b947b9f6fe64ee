"""Recipes, flags, orders of rows and learning rates: against the published recipes and transformers' own schedulers."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pgfast.train import cli as train_cli
from pgfast.train.config import TrainConfig, difference
from pgfast.train.data.records import Record
from pgfast.train.data.sources import open_dataset
from pgfast.train.demo.balanced_order import BALANCED, BalancedOrder
from pgfast.train.demo.easy_vqa_data import KINDS, kind_of
from pgfast.train.order import EpochOrder, answer_of, hold_out, some_rows, total_steps
from pgfast.train.presets import PRESETS, resolve
from pgfast.train.schedule import factor

from pgfast.errors import InputError

SEED_CARD = {
    "learning_rate": 2e-5,
    "batch_size": 4,
    "eval_batch_size": 8,
    "seed": 42,
    "accumulation": 4,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "schedule": "linear",
    "warmup_steps": 2,
    "epochs": 10.0,
    "prompt": "answer {text}",
    "frozen": ("vision", "projector"),
    "method": "full",
    "evaluations": 4,
}
BIG_VISION = {
    "learning_rate": 1e-5,
    "schedule": "cosine",
    "warmup_fraction": 0.05,
    "clip_norm": 1.0,
    "prompt": "answer en {text}",
    "answers": "cycle",
    "frozen": (),
    "method": "full",
    "epochs": 10.0,
    "loss_reduction": "example",
}


def parsed(monkeypatch: pytest.MonkeyPatch, *args: str) -> TrainConfig:
    """What the command makes of its words; nothing is opened."""
    seen: list[TrainConfig] = []

    class Parsed(Exception):
        pass

    def keep(preset: str, overrides: dict[str, Any]) -> TrainConfig:
        seen.append(resolve(preset, overrides))
        raise Parsed

    monkeypatch.setattr(train_cli, "resolve", keep)
    result = CliRunner().invoke(train_cli.train, args)
    assert isinstance(result.exception, Parsed), result.output
    return seen[0]


@pytest.mark.parametrize(("preset", "published"), [("seed", SEED_CARD), ("bv", BIG_VISION)])
def test_presets_are_the_published_recipes(preset: str, published: dict[str, Any]) -> None:
    config = resolve(preset, {})
    assert {name: getattr(config, name) for name in published} == published
    assert config.batch_size * config.accumulation == {"seed": 16, "bv": 256}[preset]


@pytest.mark.parametrize("preset", ["lora", "qlora"])
def test_adapters_leave_the_vision_tower_alone(preset: str) -> None:
    config = resolve(preset, {})
    assert (config.method, config.vision_frozen) == (preset, True)


def test_a_preset_names_only_values_that_exist_and_fit() -> None:
    assert set(PRESETS) == {"seed", "bv", "lora", "qlora", "tiny"}
    for name in PRESETS:
        assert resolve(name, {}).preset == name
    with pytest.raises(InputError, match="no preset 'sead': one of seed, bv"):
        resolve("sead", {})


def other_value(field: dataclasses.Field[Any]) -> Any:
    """A value that no preset has."""
    if field.metadata["one_of"]:
        return field.metadata["one_of"][-1]
    if isinstance(field.default, bool):
        return not field.default
    special = {"freeze": "vision", "prompt": "ask {text}", "holdout": 0.125, "batch_size": 12, "questions_per_picture": 2}
    special |= {"warmup_fraction": 0.25, "adam_beta1": 0.5, "adam_beta2": 0.75, "lora_dropout": 0.125, "feature_cache": ""}
    if field.name in special:
        return special[field.name]
    return "else" if isinstance(field.default, str) else type(field.default)(7)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("field", [f for f in dataclasses.fields(TrainConfig) if f.name != "preset"], ids=lambda f: f.name)
def test_every_value_is_a_flag(preset: str, field: dataclasses.Field[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    value, name = other_value(field), field.name.replace("_", "-")
    words = [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    before = resolve(preset, {})
    config = parsed(monkeypatch, "--preset", preset, *words)
    assert getattr(config, field.name) == value
    # the partners of exclusive pairs give way, everything else stays the preset's
    partners = {
        "warmup_fraction": "warmup_steps",
        "warmup_steps": "warmup_fraction",
        "eval_data": "holdout",
        "epochs": "max_steps",
    }
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(before, f.name)}
    assert changed <= {field.name, partners.get(field.name)}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--preset", "seed", "--warmup-fraction", "0.1"], {"warmup_steps": 0, "warmup_fraction": 0.1}),
        (["--preset", "bv", "--warmup-steps", "3"], {"warmup_steps": 3, "warmup_fraction": 0.0}),
        (["--preset", "tiny", "--eval-data", "easy-vqa:test"], {"holdout": 0.0, "eval_data": "easy-vqa:test"}),
        (["--preset", "tiny", "--epochs", "3", "--order", "epochs"], {"max_steps": 0, "epochs": 3.0}),
    ],
)
def test_a_flag_is_not_overruled_by_the_presets_other_way_to_say_it(
    words: list[str], wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parsed(monkeypatch, *words)
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "prefix"}, "--method is 'prefix': one of full, lora, qlora"),
        ({"precision": "fp16"}, "--precision is 'fp16': one of auto, bf16, fp32"),
        ({"learning_rate": -1.0}, "--learning-rate is -1.0"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"learning_rate": float("inf")}, "--learning-rate is inf"),
        ({"batch_size": 0}, "--batch-size is 0: at least 1"),
        ({"holdout": 1.0}, "--holdout is 1.0: less than 1"),
        ({"adam_beta2": 1.0}, "--adam-beta2 is 1.0: less than 1"),
        ({"warmup_fraction": 1.5}, "--warmup-fraction is 1.5"),
        ({"lora_dropout": 1.0}, "--lora-dropout is 1.0"),
        ({"epochs": 0.0}, "--epochs is 0 and --max-steps is not given"),
        ({"freeze": "vision, decoder"}, "--freeze names 'decoder': only vision, projector, language"),
        ({"freeze": "vision,projector,language"}, "--freeze names every tower"),
        ({"prompt": "answer en"}, "--prompt has no {text}"),
        ({"prompt": "answer {text}\n"}, "--prompt holds a newline"),
        ({"feature_cache": "x", "freeze": ""}, "--feature-cache needs a frozen vision tower"),
        ({"feature_cache": "x", "augment": "move-shapes"}, "--feature-cache needs"),
        ({"holdout": 0.1, "eval_data": "x"}, "--holdout and --eval-data exclude each other"),
        ({"warmup_steps": 2, "warmup_fraction": 0.1}, "--warmup-steps and --warmup-fraction exclude each other"),
        ({"order": "balanced", "batch_size": 6}, "--batch-size has to be a multiple of --questions-per-picture"),
        ({"method": "lora", "freeze": "language"}, "--freeze"),
    ],
)
def test_refusals_name_the_flag(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve("seed", values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_difference_is_said_in_flags() -> None:
    old, new = resolve("seed", {}), resolve("seed", {"learning_rate": 1e-4, "epochs": 3.0, "threads": 2})
    assert difference(old.fixed(), new.fixed()) == "--epochs was 10.0 and is 3.0, --learning-rate was 2e-05 and is 0.0001"
    assert difference(old.fixed(), old.fixed()) == ""
    # a state of an older version may know a value that this one does not
    assert "--gone was 1" in difference(old.fixed() | {"gone": 1}, old.fixed())


def test_what_a_resumed_run_may_change_does_not_change_its_digest() -> None:
    base = resolve("seed", {})
    free = {f.name for f in dataclasses.fields(TrainConfig) if f.metadata["free"]}
    assert {"skip_bad", "save_every", "patience", "threads", "workers", "eval_batch_size"} <= free
    for field in dataclasses.fields(TrainConfig):
        value = "other" if field.name == "preset" else other_value(field)
        if value != getattr(base, field.name):
            # what another flag excludes is given together with it
            more = {"warmup_steps": 0} if field.name == "warmup_fraction" else {}
            changed = dataclasses.replace(base, **{field.name: value}, **more)
            assert (changed.digest() == base.digest()) == (field.name in free), field.name


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 2), (7, 2), (100, 5), (33, 33), (50, 0)])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_learning_rates_are_those_of_transformers(kind: str, steps: int, warmup: int) -> None:
    import torch
    import transformers

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if kind == "constant":
        scheduler = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        make = getattr(transformers, f"get_{kind}_schedule_with_warmup")
        scheduler = make(optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        assert factor(step, steps, kind=kind, warmup=warmup) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


@given(st.integers(1, 40), st.integers(1, 25), st.integers(0, 9))
def test_every_row_comes_once_per_epoch(count: int, per_step: int, seed: int) -> None:
    rows = np.arange(count) * 3 + 5
    order = EpochOrder(rows, seed, per_step)
    draws = [order.draw(step) for step in range(-(-3 * count // per_step))]
    drawn, epochs = (np.concatenate(part) for part in zip(*draws, strict=True))
    assert all(len(part) == per_step for part, _ in draws)
    np.testing.assert_array_equal(epochs, np.arange(len(epochs)) // count)  # no gap and nothing left out between epochs
    for epoch in range(3):
        assert sorted(drawn[epochs == epoch]) == sorted(rows)
    # the step number is the whole cursor: a fresh object, asked in any order, says the same
    again = EpochOrder(rows, seed, per_step)
    for step in reversed(range(len(draws))):
        np.testing.assert_array_equal(again.draw(step)[0], draws[step][0])


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    rows = np.arange(50)
    orders = [tuple(EpochOrder(rows, seed, 50).draw(epoch)[0]) for seed in (1, 2, 3) for epoch in (0, 1)]
    assert len(set(orders)) == 6
    assert tuple(rows) not in orders


def test_the_number_of_steps() -> None:
    assert total_steps(100, 10, 16, 0) == 62
    assert total_steps(100, 10, 16, 5) == 5
    assert total_steps(3, 1, 16, 0) == 1
    assert total_steps(100, 0.5, 10, 0) == 5


@given(st.lists(st.integers(0, 19), min_size=1, max_size=60), st.floats(0, 0.9), st.integers(0, 5))
def test_rows_are_held_out_by_picture(shown: list[int], share: float, seed: int) -> None:
    number = {picture: i for i, picture in enumerate(dict.fromkeys(shown))}
    pictures = np.array([number[picture] for picture in shown])
    held = hold_out(pictures, share, seed)
    assert not set(pictures[held]) & set(pictures[~held])
    assert len(set(pictures[held])) == round(share * len(number))
    np.testing.assert_array_equal(held, hold_out(pictures, share, seed))


def test_a_limit_draws_by_the_seed() -> None:
    rows = np.arange(100, 300)
    few = some_rows(rows, 20, 1)
    assert len(set(few)) == 20
    assert set(few) <= set(rows)
    assert list(few) == sorted(few)
    assert list(few) != list(rows[:20])
    assert list(few) != list(some_rows(rows, 20, 2))
    assert list(some_rows(rows, 0, 1)) == list(some_rows(rows, 500, 1)) == list(rows)


@given(st.integers(1, 10), st.integers(0, 100), st.integers(0, 3))
def test_every_answer_comes_once_in_as_many_epochs(count: int, row: int, seed: int) -> None:
    answers = tuple(f"answer {i}" for i in range(count))
    taught = [answer_of(answers, epoch, row, seed) for epoch in range(3 * count)]
    for cycle in range(3):
        assert sorted(taught[cycle * count : (cycle + 1) * count]) == sorted(answers)


def test_rows_walk_through_their_answers_in_different_orders() -> None:
    answers = tuple("abcdefghij")
    assert len({tuple(answer_of(answers, e, row, 0) for e in range(10)) for row in range(20)}) > 15


@pytest.fixture(scope="module")
def easy_vqa() -> tuple[np.ndarray, list[Record]]:
    dataset = open_dataset("easy-vqa:train")
    rows = np.arange(0, len(dataset), dtype=np.int64)[100:12100]
    return rows, [dataset.record(int(row)) for row in rows]


def balanced(easy_vqa: tuple[np.ndarray, list[Record]], **values: Any) -> BalancedOrder:
    rows, records = easy_vqa
    defaults = {"seed": 1, "steps": 100, "natural_from": 0.5, "pictures": 3000, "per_picture": 4}
    return BalancedOrder(rows, records, **(defaults | values))


def test_questions_are_balanced_first_and_natural_at_the_end(easy_vqa: tuple[np.ndarray, list[Record]]) -> None:
    rows, records = easy_vqa
    kinds = [kind_of(record.text, record.answer) for record in records]
    natural = {kind: count / len(kinds) for kind, count in Counter(kinds).items()}
    order, record_of = balanced(easy_vqa), dict(zip(rows.tolist(), records, strict=True))

    def shares(step: int) -> dict[str, float]:
        drawn, epochs = order.draw(step)
        assert not epochs.any()
        asked = [record_of[row] for row in drawn.tolist()]
        for about in itertools.batched(asked, 4) if hasattr(itertools, "batched") else zip(*[iter(asked)] * 4, strict=True):
            assert len({record.picture for record in about}) == 1
        return {k: n / len(asked) for k, n in Counter(kind_of(r.text, r.answer) for r in asked).items()}

    first, last = shares(0), shares(50)
    assert shares(99) == pytest.approx(natural, abs=0.03)
    assert last == pytest.approx(natural, abs=0.03)
    assert first["color present"] > 1.7 * natural["color present"]
    assert first["what shape"] > 1.3 * natural["what shape"]
    assert sum(BALANCED.values()) == pytest.approx(1)
    assert set(BALANCED) == set(KINDS)


def test_a_balanced_step_follows_from_its_number(easy_vqa: tuple[np.ndarray, list[Record]]) -> None:
    small = {"pictures": 5, "per_picture": 20}  # more questions than any picture has
    first = [balanced(easy_vqa, **small).draw(step)[0].tolist() for step in (7, 3)]
    order = balanced(easy_vqa, **small)
    assert [order.draw(step)[0].tolist() for step in (3, 7)] == first[::-1]
    assert first[0] != first[1]
    assert balanced(easy_vqa, **small, seed=2).draw(7)[0].tolist() != first[0]
    assert len(balanced(easy_vqa, **small, natural_from=0.0).draw(0)[0]) == 100
