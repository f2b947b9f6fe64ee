"""The demo model's data and its base: easy-VQA, labels from its questions, moved shapes, the pretrained tower."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pgfast.train.demo import base_model
from pgfast.train.demo import easy_vqa_data as data
from pgfast.train.presets import resolve
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def train_split() -> data.Questions:
    return data.load("train")


def test_the_data_is_the_published_one(train_split: data.Questions) -> None:
    assert (len(train_split.images), len(train_split.texts)) == (4000, 38575)
    assert train_split.images.shape == (4000, 64, 64, 3)
    assert len(set(train_split.answers)) == 13


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
    moved = data.move_shapes(images, np.random.default_rng(0))
    assert (moved != images).any(axis=(1, 2, 3)).mean() > 0.95
    np.testing.assert_array_equal(moved, data.move_shapes(images, np.random.default_rng(0)))
    for before, after in zip(images, moved, strict=True):  # the same pixels, elsewhere
        assert Counter(map(tuple, before.reshape(-1, 3))) == Counter(map(tuple, after.reshape(-1, 3)))
    for old, new in zip(boxes, data.bounding_boxes(moved), strict=True):
        assert sorted((old[2] - old[0], old[3] - old[1])) == sorted((new[2] - new[0], new[3] - new[1]))


def test_the_tower_is_pretrained_on_training_pictures_alone(train_split: data.Questions) -> None:
    """The same pictures are kept from the tower as from the run: its hold-out is drawn over pictures in the data's order."""
    from pgfast.train.data.sources import open_dataset
    from pgfast.train.order import hold_out

    config = resolve("tiny", {})
    dataset = open_dataset(config.data)
    names = [dataset.record(row).picture for row in range(len(dataset))]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    of_run = hold_out(np.array([number[name] for name in names]), config.holdout, config.seed)
    of_tower = base_model._held_out(train_split, config)
    assert 150 < of_tower.sum() < 250
    np.testing.assert_array_equal(of_tower[train_split.image_index], of_run[: len(train_split.texts)])
    assert names[len(train_split.texts)].startswith("scene/")


def test_the_base_is_made_once_and_its_tower_learns(
    train_split: data.Questions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from pgfast.train.setup import open_base
    from transformers import PaliGemmaForConditionalGeneration

    torch.set_num_threads(1)
    monkeypatch.setattr(data, "load", lambda split: train_split.take(np.arange(4000) < 300))
    losses: list[float] = []
    config = resolve("tiny", {"tower_steps": 30, "tower_batch": 8, "precision": "fp32"})

    def note(stage: str, done: int, total: int, message: str) -> None:
        assert (stage, total) == ("vision tower", 30)
        losses.append(float(message.removeprefix("loss ")))

    folder = base_model.make_base(config, tmp_path / "base", note)
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    _, found = PaliGemmaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    assert open_base(str(folder)).num_image_tokens == 64
    before = load_file(folder / "model.safetensors")
    assert base_model.make_base(config, folder, note) == folder
    assert len(losses) == 30  # nothing was trained again
    again = load_file(base_model.make_base(config, tmp_path / "again", note) / "model.safetensors")
    assert all(before[name].tobytes() == again[name].tobytes() for name in before)
    assert not list(tmp_path.glob(".*"))
