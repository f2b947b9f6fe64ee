"""VQA accuracy against figures of the official program, and what must hold for any text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgfast import metrics
from pgfast.errors import InputError
from pgfast.metrics import normalize_answer, vqa_accuracy

# what vqaEval.py of GT-Vision-Lab/VQA gave for each text; from the comment further down on by its rules, not run through it
NORMALISED = {
    "The cat.": "cat",
    "a dog": "dog",
    "an": "",
    "Two dogs": "2 dogs",
    "ten": "10",
    "twenty": "twenty",
    "none": "0",
    "None of them": "0 of them",
    "no-one": "no 1",
    "100,978": "100978",
    "1,000 people": "1000 people",
    "$1,000": "$1000",
    "1,2 or 3": "12 or 3",
    "1,000 left-right": "1000 leftright",
    "left/right": "left right",
    "t-shirt": "t shirt",
    "5-6": "5 6",
    "-5": "5",
    "a/c": "c",
    "3.": "3",
    "3.5": "3.5",
    ".5": ".5",
    "10.5.": "10.5",
    "No. 5": "no 5",
    "U.S.A.": "usa",
    "one.two": "onetwo",
    "dr.pepper": "drpepper",
    "2:50 pm": "2:50 pm",
    "50%": "50%",
    "girl's": "girl's",
    "its": "its",
    "lets": "lets",
    "Im": "im",
    "dont know": "don't know",
    "4 o'clock": "4 o'clock",
    "yes!": "yes",
    # a mark beside a space anywhere is deleted everywhere, and one mark's space does not count for another
    "left/right / up": "leftright up",
    "blue - red-ish": "blue redish",
    "a-b, c": "b c",
    "somebody'd": "somebodyd",
    "let's": "let's",
    "Ive": "ive",
    "Id've": "id've",
    "." * 34 + "x": "..x",
    "#1 & 'x': *": "#1 & 'x': *",
}
YES, NONE, TWO, CAT = ["yes"] * 10, ["none"] * 10, ["two"] * 10, ["the cat"] * 10
# (answers, prediction, score x 100), from the same program
SCORES: list[tuple[list[str], str, float]] = [
    (YES, "yes", 100),
    (YES, " yes ", 100),
    (YES, "yes\n", 100),
    (YES, "Yes", 0),
    (YES, "yes.", 0),
    (["yes"] * 9 + ["no"], "Yes", 100),
    (["yes"] * 9 + ["no"], "yes.", 100),
    (["yes"] * 9 + ["no"], "no", 30),
    (["yes"] * 9 + ["no"], "No!", 30),
    (["yes"] * 8 + ["no"] * 2, "no", 60),
    (["yes"] * 7 + ["no"] * 3, "no", 90),
    (["none"] + ["nothing"] * 9, "none", 30),
    (["0"] * 3 + ["none"] * 7, "none", 100),
    (NONE, "0", 0),
    (TWO, "2", 0),
    (["two"] * 5 + ["2"] * 5, "2", 100),
    (["2"] * 9 + ["3"], "two", 100),
    (["the cat"] * 5 + ["cat"] * 5, "cat", 100),
    (CAT, "cat", 0),
    (["a"] * 5 + ["the"] * 5, "", 100),
]
ANSWERS = st.lists(
    st.sampled_from(["yes", "Yes.", "no", "two", "2", "the cat", "cat", ""]) | st.text(), min_size=1, max_size=10
)
MODES = st.sampled_from(["official", "always-normalise", "simple"])


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """The definition, person by person, on texts as they are."""
    people = [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers)]
    shares = [min(1.0, sum(other["answer"] == prediction for other in people if other != person) / 3) for person in people]
    return sum(shares) / len(shares)


@pytest.mark.parametrize(("text", "wanted"), NORMALISED.items())
def test_texts_are_normalised_as_by_the_official_program(text: str, wanted: str) -> None:
    assert normalize_answer(text) == wanted


@pytest.mark.parametrize(("answers", "prediction", "wanted"), SCORES)
def test_scores_are_those_of_the_official_program(answers: list[str], prediction: str, wanted: float) -> None:
    assert 100 * vqa_accuracy(prediction, answers) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("mode", ["always-normalise", "simple"])
@pytest.mark.parametrize(
    ("answers", "prediction"), [(YES, "Yes"), (YES, "yes."), (NONE, "0"), (TWO, "2"), (CAT, "cat"), (["Yes!"], "yes")]
)
def test_other_modes_normalise_where_all_agree(mode: Any, answers: list[str], prediction: str) -> None:
    assert vqa_accuracy(prediction, answers, mode) == 1.0
    assert vqa_accuracy(prediction, answers) == 0.0


def test_simple_leaves_nobody_out() -> None:
    scores = [vqa_accuracy("no", ["no"] * k + ["yes"] * (10 - k), "simple") for k in range(6)]
    assert scores == [0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1, 1, 1]


def test_one_answer_counts_as_ten_equal_ones() -> None:
    for mode in ("official", "always-normalise", "simple"):
        assert vqa_accuracy("red", ["red"], mode) == 1.0
        assert vqa_accuracy("blue", ["red"], mode) == 0.0
    assert vqa_accuracy("Red", ["red"]) == vqa_accuracy("Red", ["red"] * 10) == 0.0


def test_a_line_break_inside_is_a_space_before_answers_are_compared() -> None:
    assert vqa_accuracy("red\tcar", ["red\ncar"] * 10) == 1.0
    # ten that differ in line breaks alone are unanimous, so nothing is normalised
    assert vqa_accuracy("Red car", ["red car"] * 5 + ["red\ncar "] * 5) == 0.0


def test_no_answer_and_unknown_modes_are_refused() -> None:
    with pytest.raises(InputError, match="no reference answer"):
        vqa_accuracy("yes", [])
    with pytest.raises(InputError, match="official, always-normalise, simple"):
        vqa_accuracy("yes", YES, "exact")  # type: ignore[arg-type]


def test_the_table_of_contractions_only_moves_apostrophes() -> None:
    table = metrics._CONTRACTIONS
    assert len(table) == 120
    for key, value in table.items():
        assert key.replace("'", "") == value.replace("'", ""), key
    reached = {key for key in table if normalize_answer(key) == table[key]}
    assert set(table) - reached == {"Id've", "I'dve", "Im", "Ive"}


@given(st.text(), ANSWERS, MODES)
def test_a_score_is_between_0_and_1(prediction: str, answers: list[str], mode: Any) -> None:
    assert 0 <= vqa_accuracy(prediction, answers, mode) <= 1


@given(st.data(), ANSWERS, MODES)
def test_the_order_of_answers_does_not_matter(data: st.DataObject, answers: list[str], mode: Any) -> None:
    prediction = data.draw(st.sampled_from(answers) | st.text())
    other = data.draw(st.permutations(answers))
    assert vqa_accuracy(prediction, answers, mode) == vqa_accuracy(prediction, other, mode)


@given(st.data(), ANSWERS.filter(lambda answers: len(answers) > 1))
def test_a_score_is_the_mean_over_people_after_normalising(data: st.DataObject, answers: list[str]) -> None:
    prediction = data.draw(st.sampled_from(answers) | st.text())
    wanted = leave_one_out(normalize_answer(prediction), [normalize_answer(answer) for answer in answers])
    assert vqa_accuracy(prediction, answers, "always-normalise") == pytest.approx(wanted)
    stripped = {answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers}
    if len(stripped) > 1:
        assert vqa_accuracy(prediction, answers) == pytest.approx(wanted)


@given(st.integers(0, 10))
def test_ten_answers_have_a_closed_form(k: int) -> None:
    answers = ["dog"] * k + [f"cat {number}" for number in range(10 - k)]
    assert vqa_accuracy("The dog!", answers, "always-normalise") == [0, 0.3, 0.6, 0.9, 1][min(k, 4)]


@given(st.text(alphabet=st.sampled_from("aA nthe.,'-/!?105\n\t ") | st.characters(), max_size=40))
def test_normalising_twice_changes_nothing_up_to_32_periods(text: str) -> None:
    once = normalize_answer(text)
    if text.count(".") <= 32:
        assert normalize_answer(once) == once


def test_normalising_twice_changes_texts_with_more_periods() -> None:
    once = normalize_answer("." * 40)
    assert once == "." * 8
    assert normalize_answer(once) == ""


def test_metrics_needs_nothing_heavy() -> None:
    code = "import sys, pgfast.metrics; print(sorted(sys.modules.keys() & {'numpy', 'torch', 'PIL', 'onnxruntime'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
