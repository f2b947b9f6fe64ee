"""The demo model's scenes: drawn as they say, asked about truly; the order of a run's questions; how tasks are scored."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pgfast.train.data.demo_scenes import DemoDataset
from pgfast.train.data.records import Record
from pgfast.train.demo import easy_vqa_data, mixed_order, score
from pgfast.train.demo.balanced_order import BalancedOrder
from pgfast.train.demo.easy_vqa_data import COLORS, SHAPES
from pgfast.train.demo.mixed_order import MixedOrder
from pgfast.train.demo.scene_questions import caption, detect, detection, easy_answer, questions
from pgfast.train.demo.scenes import MOST_THINGS, RGB, Thing, make_scene
from pgfast.train.demo.vision_pretraining import NOTHING, SIDE, patch_labels

from pgfast.locations import box_in_pixels, parse
from pgfast.types import Detection

RED, BLUE, GRAY = (COLORS.index(name) for name in ("red", "blue", "gray"))
CIRCLE, RECTANGLE, TRIANGLE = range(3)
THINGS = (
    Thing(CIRCLE, RED, (10, 2, 20, 12)),
    Thing(TRIANGLE, GRAY, (30, 16, 47, 36)),
    Thing(CIRCLE, BLUE, (0, 48, 16, 64)),
)


def test_scenes_are_drawn_as_they_say() -> None:
    counts = np.zeros(MOST_THINGS + 1)
    for number in range(200):
        scene = make_scene(5, number)
        assert scene == make_scene(5, number)
        counts[len(scene.things)] += 1
        picture = scene.draw().astype(int)
        middles = [thing.box[1] + thing.box[3] for thing in scene.things]
        assert middles == sorted(middles)
        assert all(b - a >= 8 for a, b in itertools.pairwise(middles))
        outside = np.ones((64, 64), bool)
        for thing in scene.things:
            top, left, bottom, right = thing.box
            assert 0 <= top < bottom <= 64
            assert 0 <= left < right <= 64
            assert outside[top:bottom, left:right].all()  # nor do boxes come near each other
            around = slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1)  # edges are soft
            outside[around] = False
            ink = (picture[top:bottom, left:right] != scene.background).any(axis=2)
            assert ink.any(axis=1).all()  # it reaches all four edges
            assert ink.any(axis=0).all()
            full = (picture[top + 1 : bottom - 1, left + 1 : right - 1] == RGB[thing.color]).all(axis=2).mean()
            low, high = {"circle": (0.6, 0.95), "rectangle": (1, 1), "triangle": (0.2, 0.6)}[SHAPES[thing.shape]]
            assert low <= full <= high, (thing, full)
        assert (picture[outside] == scene.background).all()
    assert (counts[1:] > 25).all()


def test_what_is_said_about_a_scene() -> None:
    assert caption(THINGS) == "a red circle, a gray triangle and a blue circle"
    assert caption(THINGS[:2]) == "a red circle and a gray triangle"
    assert caption(THINGS[:1]) == "a red circle"
    assert detection(THINGS, ["circle"]) == (
        "<loc0160><loc0032><loc0320><loc0192> circle ; <loc0000><loc0768><loc0256><loc1023> circle"
    )
    assert detect(THINGS, ["gray triangle", "red circle"]).text == "detect gray triangle ; red circle"
    assert detect(THINGS, ["red triangle"]).answer == ""


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what color is the triangle?", "gray"),
        ("what color is the circle?", None),
        ("what is the blue shape?", "circle"),
        ("what shape is in the picture?", None),
        ("is there a red shape?", "yes"),
        ("is no red shape present?", "no"),
        ("is there a rectangle?", "no"),
        ("does the image not contain a rectangle?", "yes"),
    ],
)
def test_easy_questions_about_several_things(question: str, answer: str | None) -> None:
    assert easy_answer(question, THINGS) == answer


def test_easy_answers_are_the_published_ones() -> None:
    split = easy_vqa_data.load("test")
    shape, color = easy_vqa_data.labels(split)
    known = 0
    for picture, question, answer in zip(split.image_index, split.texts, split.answers, strict=True):
        if shape[picture] >= 0 and color[picture] >= 0:
            thing = Thing(int(shape[picture]), int(color[picture]), (0, 0, 8, 8))
            assert easy_answer(question, [thing]) == answer, question
            known += 1
    assert known > 5000


def test_questions_are_true_and_boxes_come_back_to_the_pixel() -> None:
    easy = sorted(set(easy_vqa_data.load("test").texts))
    kinds = set()
    for number in range(100):
        things = make_scene(6, number).things
        asked = questions(things, easy, np.random.default_rng(number))
        kinds |= {one.kind for one in asked}
        assert len(asked) == len(set(asked))
        for one in asked:
            if one.kind.startswith("detect"):
                labels = one.text.removeprefix("detect ").split(" ; ")
                found = parse(one.answer)
                assert not found.problems
                boxes = {(each.label, *box_in_pixels(each.bins, 64, 64)) for each in found.objects}
                # the far edge has a bin of its own, half a hundredth of a pixel before the border
                boxes = {(label, *np.round(box, 0)) for label, *box in boxes}
                names = [(thing, {thing.name, SHAPES[thing.shape]}) for thing in things]
                wanted = {
                    (label, *(float(thing.box[i]) for i in (1, 0, 3, 2)))
                    for label in labels
                    for thing, own in names
                    if label in own
                }
                assert boxes == wanted
                assert (one.kind == "detect present") == bool(wanted)
    assert kinds >= {"caption", "detect present", "detect absent", "count", "thing", "side", "what color", "what shape"}


def test_patches_are_labelled_by_what_covers_most_of_them() -> None:
    labels = patch_labels(THINGS).reshape(SIDE, SIDE, 8)
    assert tuple(labels[4, 2, :2]) == (TRIANGLE, GRAY)
    assert tuple(labels[0, 7]) == (CIRCLE, BLUE, 0, 48, 16, 64, 2, 0)
    assert tuple(labels[7, 0, :2]) == NOTHING
    assert tuple(labels[1, 0]) == (CIRCLE, RED, 10, 2, 20, 12, 0, 2)
    assert (labels[..., 0] != NOTHING[0]).sum() == 2 * 2 + 3 * 3 + 2 * 2


def records(dataset: DemoDataset) -> tuple[np.ndarray, list[Record], MixedOrder]:
    rows = np.arange(len(dataset))
    all_of_them = [dataset.record(row) for row in rows]
    easy = np.array([record.picture.startswith("easy-vqa/") for record in all_of_them])
    first = BalancedOrder(
        rows[easy],
        [record for record in all_of_them if record.picture.startswith("easy-vqa/")],
        seed=1,
        steps=100,
        natural_from=0.7,
        pictures=2,
        per_picture=3,
    )
    scenes = [record for record in all_of_them if record.picture.startswith("scene/")]
    return rows, all_of_them, MixedOrder(first, rows[~easy], scenes, seed=1, steps=100, pictures=5, per_picture=3)


def test_scenes_become_crowded_as_the_run_goes_on() -> None:
    dataset = DemoDataset(scenes=300)
    _, all_of_them, order = records(dataset)
    most = []
    for step in range(100):
        rows, epochs = order.draw(step)
        np.testing.assert_array_equal(rows, order.draw(step)[0])
        assert not epochs.any()
        assert len(rows) == 7 * 3
        drawn = [all_of_them[row].picture for row in rows]
        assert [name.split("/")[0] for name in drawn] == ["easy-vqa"] * 6 + ["scene"] * 15
        for first in range(0, len(rows), 3):  # questions about a picture follow each other
            assert len(set(drawn[first : first + 3])) == 1
        sizes = [len(make_scene(0, int(name.split("/")[1])).things) for name in drawn[6:]]
        most.append(max(sizes))
    starts = [next(step for step, size in enumerate(most) if size >= count) for count in range(1, MOST_THINGS + 1)]
    for start, share in zip(starts, mixed_order.CROWDED_FROM, strict=True):
        assert round(100 * share) <= start <= 100 * share + 3


def test_pictures_of_the_data_are_those_that_are_scored_against() -> None:
    dataset = DemoDataset(scenes=3)
    easy = len(dataset.easy)
    assert dataset.record(easy).picture == "scene/0"
    np.testing.assert_array_equal(dataset.image(easy), make_scene(0, 0).draw())
    assert all(make_scene(score.SEED, number) != make_scene(0, number) for number in range(50))


def test_boxes_are_paired_by_label_and_overlap() -> None:
    assert score.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert score.iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    found = [Detection("a", (0, 0, 10, 10), 1), Detection("a", (0, 0, 10, 8), 1), Detection("b", (0, 0, 9, 9), 1)]
    wanted = [("a", [0.0, 0.0, 10.0, 10.0]), ("b", [0.0, 0.0, 10.0, 10.0]), ("c", [0.0, 0.0, 10.0, 10.0])]
    # each box once: the second `a` finds nobody, and labels do not mix
    assert score.matches(found, wanted) == pytest.approx([1.0, 0.81])
