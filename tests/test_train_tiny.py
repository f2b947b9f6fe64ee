"""The demo model's training: data, sampling, and a run that is stopped and continued."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pgfast.train.config import TinyConfig
from pgfast.train.demo import easy_vqa_data as data
from pgfast.train.sampling import BALANCED, QuestionSampler
from pgfast.train.schedule import cosine, linear

from pgfast.errors import TrainError

SHORT = TinyConfig(
    tower_steps=4, tower_batch=8, steps=6, pictures_per_step=4, questions_per_picture=2, evaluate_every=100, save_every=1
)


@pytest.fixture(scope="module")
def train_split() -> data.Questions:
    return data.load("train")


def test_the_data_is_the_published_one(train_split: data.Questions) -> None:
    assert (len(train_split.images), len(train_split.texts)) == (4000, 38575)
    assert train_split.images.shape == (4000, 64, 64, 3)


def test_the_held_out_pictures_are_not_in_the_training_set(train_split: data.Questions) -> None:
    train, validation = data.hold_out(train_split, 0.05, 42)
    assert (len(train.images), len(validation.images)) == (3800, 200)
    assert len(train.texts) + len(validation.texts) == len(train_split.texts)
    # a question keeps its picture through the renumbering
    seen = {
        (image.tobytes(), text)
        for image, text in zip(train_split.images[train_split.image_index], train_split.texts, strict=True)
    }
    assert all(
        (validation.images[i].tobytes(), t) in seen for i, t in zip(validation.image_index, validation.texts, strict=True)
    )


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("what color is the circle?", "red", "what color"),
        ("what is the red shape?", "circle", "what shape"),
        ("is there not a red shape?", "no", "color present"),
        ("is no red shape present?", "yes", "color absent"),
        ("is there a red shape?", "no", "color absent"),
        ("does the image contain a circle?", "yes", "shape present"),
        ("does the image not contain a circle?", "yes", "shape absent"),
    ],
)
def test_kinds_of_questions(question: str, answer: str, kind: str) -> None:
    assert data.kind_of(question, answer) == kind


def test_labels_from_questions_agree_with_the_pictures(train_split: data.Questions) -> None:
    _, color = data.labels(train_split)
    exact = {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "yellow": (255, 255, 0), "teal": (0, 128, 128)}
    checked = 0
    for row in np.flatnonzero(color >= 0)[:600]:
        rgb = exact.get(data.COLORS[color[row]])
        if rgb is not None:
            assert (train_split.images[row] == rgb).all(axis=2).any(), row
            checked += 1
    assert checked > 200


def test_moving_a_shape_keeps_it_whole(train_split: data.Questions) -> None:
    images = train_split.images[:200]
    boxes = data.bounding_boxes(images)
    moved = data.move_shapes(images, boxes, np.random.default_rng(0))
    assert (moved != images).any(axis=(1, 2, 3)).mean() > 0.95
    for before, after in zip(images, moved, strict=True):  # the same pixels, elsewhere
        assert sorted(map(tuple, before.reshape(-1, 3))) == sorted(map(tuple, after.reshape(-1, 3)))
    for old, new in zip(boxes, data.bounding_boxes(moved), strict=True):
        assert sorted((old[2] - old[0], old[3] - old[1])) == sorted((new[2] - new[0], new[3] - new[1]))


def test_questions_are_balanced_first_and_natural_at_the_end(train_split: data.Questions) -> None:
    sampler = QuestionSampler(train_split, natural_from=0.5)
    kinds = train_split.kinds()
    natural = np.bincount(kinds, minlength=len(data.KINDS)) / len(kinds)

    def shares(progress: float) -> np.ndarray:
        rng = np.random.default_rng(0)
        pictures, asked = sampler.draw(rng, progress, 3000, 4)
        np.testing.assert_array_equal(train_split.image_index[asked], np.repeat(pictures, 4))
        return np.bincount(kinds[asked], minlength=len(data.KINDS)) / len(asked)

    np.testing.assert_allclose(shares(0.5), natural, atol=0.03)
    first = shares(0.0)
    rare = data.KINDS.index("color present")
    assert first[rare] > 1.7 * natural[rare]
    assert first[data.KINDS.index("what shape")] > 1.3 * natural[data.KINDS.index("what shape")]
    assert sum(BALANCED.values()) == pytest.approx(1)


def test_schedules() -> None:
    assert [linear(s, 4) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    factors = [cosine(s, 100, 0.1) for s in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[-1] < 0.001


class Stopped(Exception):
    pass


@pytest.fixture
def few_pictures(train_split: data.Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole program on a tenth of the pictures."""
    few = train_split.take(np.arange(4000) < 400)
    monkeypatch.setattr(data, "load", lambda split: few)


def run(out: Path, stop_after: int | None = None) -> tuple[list[str], dict[str, Any]]:
    from pgfast.train.trainer import TinyRun

    seen: list[str] = []

    def on_progress(stage: str, done: int, total: int, message: str) -> None:
        seen.append(f"{stage} {done}/{total} {message}")
        if len(seen) == stop_after:
            raise Stopped

    return seen, TinyRun(SHORT, out, on_progress).run()


@pytest.mark.usefixtures("few_pictures")
def test_a_run_that_is_stopped_continues_to_the_same_weights(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    whole, report = run(tmp_path / "whole")
    assert len(whole) == SHORT.tower_steps + SHORT.steps
    for stop_after in (2, 4, 7):  # in the tower, at the change of stage, in the whole model
        out = tmp_path / f"stopped-{stop_after}"
        with pytest.raises(Stopped):
            run(out, stop_after)
        rest, continued = run(out)
        assert rest == whole[-len(rest) :]
        assert len(rest) < len(whole)
        assert continued == report
        first, second = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (tmp_path / "whole", out))
        assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.usefixtures("few_pictures")
def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    from pgfast.train.trainer import TinyRun

    run(tmp_path)
    with pytest.raises(TrainError, match="another recipe"):
        TinyRun(TinyConfig(seed=1), tmp_path, lambda *args: None)


@pytest.mark.usefixtures("few_pictures")
def test_bad_folders_get_a_train_error(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"damaged")
    with pytest.raises(TrainError, match="damaged"):
        run(tmp_path)
    with pytest.raises(TrainError, match="cannot be created"):
        run(tmp_path / "state.pt" / "below")


@pytest.mark.usefixtures("few_pictures")
def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("pgfast.train.trainer.tower_loss", lambda *args: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(TrainError, match="nan at step 1"):
        run(tmp_path)


@pytest.mark.usefixtures("few_pictures")
def test_history_is_json_lines_with_losses_and_validation(tmp_path: Path) -> None:
    from pgfast.train.trainer import TinyRun

    config = dataclasses.replace(SHORT, steps=51, evaluate_every=50)
    TinyRun(config, tmp_path, lambda *args: None).run()
    loss, validation = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert (loss["stage"], loss["step"]) == ("whole model", 50)
    assert 0 < loss["loss"] < 10
    assert 0 <= validation["validation"]["accuracy"] <= 1
