"""The page at `/`, used as people use it: in a browser, by clicks, keys, drops and the clipboard."""

from __future__ import annotations

from pathlib import Path

import pytest
from page_browser import Page
from page_server import Fake
from page_use import CIRCLE, DONE, QUESTION, SHOTS, TWO_CATS, ask, needs_chromium, percent, put, text
from PIL import Image

from pgfast.engine import Engine

pytest_plugins = ("page_fixtures",)


# ---- asking


@needs_chromium
def test_choose_a_picture_ask_and_read_the_answer(page: Page, real: str, demo: Engine) -> None:
    page.open(real)
    put(page)
    assert "640 \N{MULTIPLICATION SIGN} 640" in text(page, "#caption")
    ask(page, QUESTION)
    page.until(DONE)
    expected = demo.answer(CIRCLE, QUESTION)
    assert text(page, "[aria-current] .answer") == expected.text == "blue"
    assert text(page, "[aria-current] .confidence b") == percent(expected.confidence)
    bar = page.run("document.querySelector('[aria-current] .scale i').style.width")
    assert float(bar.removesuffix("%")) == pytest.approx(expected.confidence * 100, abs=1e-3)
    assert text(page, "[aria-current] .took").endswith("ms")
    assert text(page, "#spoken").startswith(f"blue. Confidence {percent(expected.confidence)}")
    assert any(address.endswith("/v1/answer?stream=1") for address in page.requests)
    page.screenshot(SHOTS / "light.png")


@needs_chromium
def test_fixed_choices_have_a_bar_each(page: Page, real: str, demo: Engine) -> None:
    page.open(real)
    put(page)
    ask(page, QUESTION, choices=" red, green ,blue,, ")
    page.until(DONE)
    expected = demo.answer(CIRCLE, QUESTION, choices=["red", "green", "blue"]).choices
    assert expected is not None
    shown = page.run(
        "[...document.querySelectorAll('.shares li')].map((li) => [li.children[0].innerText, li.children[2].innerText])"
    )
    assert shown == [[name, percent(share)] for name, share in expected.items()]
    assert text(page, ".shares .best b") == max(expected, key=lambda name: expected[name])


@needs_chromium
def test_the_example_needs_no_picture_of_ones_own(page: Page, real: str) -> None:
    page.open(real)
    page.click("#example")
    page.until("document.querySelector('#picture').naturalWidth")
    page.click("#ask button")
    page.until(DONE)
    assert text(page, ".answer") == "blue"


@needs_chromium
def test_a_raw_prompt_goes_to_the_model_as_it_is(page: Page, real: str, demo: Engine) -> None:
    prompt = "answer en is there a circle?"
    page.open(real)
    put(page)
    ask(page, prompt, raw=True)
    page.until(DONE)
    assert text(page, ".answer") == demo.generate(CIRCLE, prompt).text


@needs_chromium
def test_the_keyboard_is_enough(page: Page, real: str) -> None:
    page.open(real)

    def tab_to(selector: str) -> None:
        for _ in range(20):
            page.press("Tab")
            assert page.run("""(() => {
                const seen = [document.activeElement, document.activeElement.closest("label")].filter(Boolean);
                return seen.some((node) => getComputedStyle(node).outlineStyle === "solid");
            })()"""), page.run("document.activeElement.outerHTML")
            if page.run(f"document.activeElement.matches({selector!r})"):
                return
        raise AssertionError(f"{selector} is not reached")

    tab_to("#choose")
    page.choose_file(CIRCLE, lambda: page.press("Enter"))
    page.until("document.activeElement.id === 'text'")
    page.type(QUESTION)
    page.press("Enter")
    page.until(DONE)
    tab_to("summary")
    page.press("Enter")
    assert "request" in text(page, "details dl")


@needs_chromium
def test_a_copied_picture_is_pasted_anywhere_and_text_into_the_field(page: Page, real: str) -> None:
    page.open(real)
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.run("""fetch("page/example.png").then((response) => response.blob())
        .then((blob) => navigator.clipboard.write([new ClipboardItem({"image/png": blob})]))""")
    page.press("v", commands=("paste",), modifiers=2)
    page.until("document.querySelector('#picture').naturalWidth === 640")
    page.run(f"navigator.clipboard.writeText({QUESTION!r})")
    page.click("#text")
    page.press("v", commands=("paste",), modifiers=2)
    page.press("Enter")
    page.until(DONE)
    assert text(page, ".answer") == "blue"


@needs_chromium
def test_dropped_files(page: Page, real: str, tmp_path: Path) -> None:
    page.open(real)
    (tmp_path / "notes.txt").write_text("no picture")
    page.drop_file(tmp_path / "notes.txt")
    page.until("document.querySelector('#notice').innerText.startsWith('notes.txt is not a picture')")
    assert page.run("document.querySelector('#frame').hidden")
    page.drop_file(CIRCLE)
    page.until("document.querySelector('#picture').naturalWidth")
    assert text(page, "#notice") == ""


# ---- streams, the queue, history


@needs_chromium
def test_text_appears_while_it_is_made(page: Page, fake: Fake, fake_address: str) -> None:
    page.open(fake_address)
    put(page)
    ask(page, "what is it?")
    asked = fake.asked()
    assert asked.fields == [("question", "what is it?")]
    assert asked.picture == CIRCLE.read_bytes()  # small enough: as it is
    asked.piece("a cä")
    page.until("document.querySelector('.answer').textContent === 'a cä'")
    assert text(page, "#spoken") == ""
    asked.piece("t")
    page.until("document.querySelector('.answer').textContent === 'a cät'")
    asked.answer("a cät", 0.25, finish_reason="length")
    page.until(DONE)
    assert text(page, ".confidence b") == "25.0 %"
    assert text(page, ".trouble") == "Cut off at the limit of tokens."


@needs_chromium
def test_questions_wait_for_each_other_and_can_be_stopped(page: Page, fake: Fake, fake_address: str) -> None:
    page.open(fake_address)
    put(page)
    ask(page, "first")
    first = fake.asked()
    first.piece("so ")
    page.until("document.querySelector('.entry .answer').textContent === 'so '")
    for question in ("second", "third"):
        ask(page, question)
    assert page.run("[...document.querySelectorAll('.entry')].map((node) => node.dataset.state)") == [
        "waiting",
        "waiting",
        "running",
    ]
    assert fake.idle
    page.click(".entry:nth-child(1) .stop")  # third: never asked
    page.press("Escape")  # first: in the middle
    assert first.gone.wait(20)
    second = fake.asked()
    assert second.fields == [("question", "second")]
    second.answer("yes")
    page.until("document.querySelector('.entry:nth-child(2)').dataset.state === 'done'")
    assert page.run("[...document.querySelectorAll('.entry')].map((node) => node.dataset.state)") == [
        "stopped",
        "done",
        "stopped",
    ]
    assert text(page, ".entry:nth-child(3) .answer") == "so "
    page.click(".entry:nth-child(1) .again")
    third = fake.asked()
    assert third.fields == [("question", "third")]
    third.answer("again")
    page.until("document.querySelector('.entry:nth-child(1)').dataset.state === 'done'")
    assert fake.idle


@needs_chromium
def test_earlier_pictures_and_questions_come_back(page: Page, fake: Fake, fake_address: str, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (90, 30), "red").save(other)
    page.open(fake_address)
    put(page)
    ask(page, "detect cat ; dog", raw=True)
    fake.asked().answer(TWO_CATS)
    page.until(DONE)
    ask(page, "is it?", choices="yes, no")
    fake.asked().answer("no", choices={"yes": 0.25, "no": 0.75})
    page.until("document.querySelector('[aria-current] .answer').innerText === 'no'")
    assert page.run("document.querySelectorAll('.box').length") == 0
    put(page, other)
    assert page.run("document.querySelectorAll('.entry').length") == 0
    assert page.run("document.querySelector('#picture').naturalWidth") == 90
    page.click("[aria-label='Picture 1: blue_circle.png']")
    page.until("document.querySelector('#picture').naturalWidth === 640")
    assert text(page, "[aria-current] .answer") == "no"
    page.click(".entry:nth-child(2) .asked")
    assert text(page, "[aria-current] .answer") == "2 \N{MULTIPLICATION SIGN} cat, dog"
    assert page.run("document.querySelectorAll('.box').length") == 3
    fields = "['[name=mode]:checked', '#text', '#choices'].map((field) => document.querySelector(field).value)"
    assert page.run(fields) == ["prompt", "detect cat ; dog", ""]
    page.click(".entry:nth-child(1) .asked")
    assert page.run(fields) == ["question", "is it?", "yes, no"]


@needs_chromium
def test_boxes_lie_where_the_text_says(page: Page, fake: Fake, fake_address: str, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.new("RGB", (800, 300), "gray").save(wide)
    page.open(fake_address)
    put(page, wide)
    ask(page, "detect cat ; dog", raw=True)
    asked = fake.asked()
    assert asked.fields == [("prompt", "detect cat ; dog")]
    asked.piece("<loc0256><loc0128><loc0768>")  # not a box yet
    page.until("document.querySelector('.answer').textContent.includes('loc0768')")
    assert page.run("document.querySelectorAll('.box').length") == 0
    asked.piece("<loc0896> cat ; ")
    page.until("document.querySelectorAll('.box').length === 1")
    asked.answer(TWO_CATS + " ; <loc1024><loc0000><loc0001><loc0001> no bin")
    page.until(DONE)
    page.until("document.getAnimations().length === 0")
    rectangles = """[...document.querySelectorAll("#picture, .box")].map((node) => {
        const {left, top, width, height} = node.getBoundingClientRect();
        return [left, top, width, height];
    })"""
    picture, *boxes = page.run(rectangles)
    for (y0, x0, y1, x1), box in zip([(256, 128, 768, 896), (0, 512, 102, 1023), (800, 100, 900, 300)], boxes, strict=True):
        left, top, width, height = picture
        expected = [left + x0 / 1024 * width, top + y0 / 1024 * height, (x1 - x0) / 1024 * width, (y1 - y0) / 1024 * height]
        assert box == pytest.approx(expected, abs=0.1)
    assert picture[2] / picture[3] == pytest.approx(800 / 300, rel=0.01)
    assert page.run("[...document.querySelectorAll('.box')].map((box) => box.innerText)") == ["cat", "dog", "cat"]
    marks = page.run("[...document.querySelectorAll('.box')].map((box) => getComputedStyle(box).borderTopColor)")
    assert marks[0] == marks[2] != marks[1]
    page.screenshot(SHOTS / "boxes.png")
