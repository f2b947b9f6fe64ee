"""The page when something goes wrong, on a phone, in the dark."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_browser import Page
from page_server import Fake, serving, serving_real
from page_use import DONE, MAX_BODY, QUESTION, SHOTS, TWO_CATS, ask, needs_chromium, put, text
from PIL import Image

from pgfast.engine import Engine
from pgfast.server.config import ServerConfig

pytest_plugins = ("page_fixtures",)


# ---- trouble


@needs_chromium
def test_what_the_server_refuses_is_one_clear_line(page: Page, real: str) -> None:
    page.open(real)
    page.click("#ask button")
    assert text(page, "#notice") == "Choose a picture first."
    put(page)
    ask(page, "why " * 200)
    page.until("document.querySelector('.entry[data-state=failed]')")
    line = text(page, ".trouble")
    assert "tokens: this model takes at most 128" in line
    assert "\n" not in line
    page.problems.clear()  # Chromium logs every 400


@needs_chromium
def test_an_api_key_is_asked_for_and_kept_for_the_tab(page: Page, demo: Engine) -> None:
    with serving_real(demo, ServerConfig(api_keys=("open-sesame",))) as address:
        page.open(address)
        put(page)
        ask(page, QUESTION)
        page.until("document.activeElement.id === 'key-text'")
        notice = "document.querySelector('#notice').innerText"
        for key, line in (
            ("schlüssel", "An API key has plain"),
            ("wrong", "The server does not accept this"),
            ("open-sesame", ""),
        ):
            page.press("a", commands=("selectAll",), modifiers=2)
            page.type(key)
            page.press("Enter")
            page.until(f"{notice}.startsWith({line!r})" if line else DONE)
        assert text(page, ".answer") == "blue"
        assert page.run("document.querySelector('#key').hidden")
        assert page.run("Object.keys(localStorage).length + document.cookie.length") == 0
        page.call("Page.reload")
        page.until("document.readyState === 'complete' && document.querySelector('#frame').hidden")
        put(page)
        ask(page, QUESTION)
        page.until(DONE)
        page.problems.clear()  # Chromium logs every 401


@needs_chromium
def test_a_busy_server_is_asked_once_more(page: Page, fake: Fake, fake_address: str) -> None:
    page.open(fake_address)
    put(page)
    ask(page, "first")
    fake.asked().refuse(429, Retry_After="1")
    page.until("document.querySelector('.trouble').innerText === 'The server is busy. Trying again in 1 s.'")
    fake.asked().answer("here")
    page.until(DONE)
    assert text(page, ".trouble") == ""
    ask(page, "second")
    fake.asked().refuse(503, Retry_After="0")
    fake.asked().refuse(503, Retry_After="7")
    page.until("document.querySelector('.trouble').innerText === 'The server is busy. Ask again in 7 s.'")
    ask(page, "third")
    fake.asked().refuse(429, Retry_After="3600")  # nobody waits that long
    page.until("document.querySelector('.trouble').innerText === 'The server is busy. Ask again in 3600 s.'")
    page.problems.clear()  # Chromium logs every 429


@needs_chromium
def test_streams_that_break(page: Page) -> None:
    fake = Fake(ServerConfig())
    with serving(fake.app, fake.config) as address:
        page.open(address)
        put(page)
        for number, (break_off, line) in enumerate(BREAKS, start=1):
            ask(page, f"question {number}")
            asked = fake.asked()
            asked.piece("half")
            break_off(asked)
            page.until(f"document.querySelectorAll('.entry[data-state=failed]').length === {number}")
            assert text(page, ".trouble") == line
            assert text(page, ".answer") == "half"
    ask(page, "anybody?")
    page.until("document.querySelector('.trouble').innerText === 'The server cannot be reached. Is it still running?'")
    page.problems.clear()  # Chromium logs the refused connection


BREAKS: list[tuple[Callable[[Any], None], str]] = [
    (lambda asked: asked.error("the server failed"), "The server failed."),
    (lambda asked: asked.end(), "The connection broke before the answer was complete."),
]


@needs_chromium
def test_pictures_over_the_limit_are_made_smaller_and_stay_upright(
    page: Page, fake: Fake, fake_address: str, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 90, (300, 400, 3), dtype=np.uint8)
    noise[:, :200, 0] += 150  # the left half is red; upright (a quarter to the right) the upper one
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    assert (tmp_path / "turned.jpg").stat().st_size > MAX_BODY
    page.open(fake_address)
    put(page, tmp_path / "turned.jpg")
    assert "300 \N{MULTIPLICATION SIGN} 400, sent as" in text(page, "#caption")
    ask(page, "what is it?")
    asked = fake.asked()
    asked.answer("noise")
    page.until(DONE)
    assert len(asked.picture) < MAX_BODY
    sent = Image.open(io.BytesIO(asked.picture))
    assert sent.getexif().get(0x0112, 1) == 1
    assert sent.height / sent.width == pytest.approx(4 / 3, rel=0.02)
    pixels = np.asarray(sent).astype(int)
    redness = pixels[..., 0] - pixels[..., 2]
    assert redness[: sent.height // 2 - 8].mean() > 100
    assert abs(redness[sent.height // 2 + 8 :].mean()) < 20


# ---- looks


def fill(page: Page, fake: Fake) -> None:
    """Everything that can be on the page at a time."""
    put(page)
    ask(page, "this fails")
    fake.asked().refuse(401)
    page.until("document.activeElement.id === 'key-text'")
    ask(page, "how?")
    fake.asked().answer("with " + "averyveryverylongword" * 4)
    page.until(DONE)
    ask(page, "detect cat ; dog", raw=True)
    fake.asked().answer(TWO_CATS, 0.75, choices={"a rather long choice of words": 0.6, "b": 0.4})
    page.until(DONE)
    page.click("summary")
    page.drop_file(Path(__file__))
    page.until("document.querySelector('#notice').innerText")
    page.until("document.getAnimations().length === 0")
    page.problems.clear()  # Chromium logs every 401


@needs_chromium
def test_a_phone_scrolls_one_way_and_has_room_for_thumbs(page: Page, fake: Fake, fake_address: str) -> None:
    page.emulate(width=320, height=640, phone=True)
    page.open(fake_address)
    small = """[...document.querySelectorAll("button, label:has(input), textarea, input, summary")]
        .filter((node) => node.checkVisibility() && !node.matches("label input"))
        .map((node) => [node.outerHTML.slice(0, 80), node.getBoundingClientRect()])
        .filter(([, {width, height}]) => Math.min(width, height) < 44).map(([what]) => what)"""
    for state in ("empty", "full"):
        if state == "full":
            fill(page, fake)
        assert page.run("[document.documentElement.scrollWidth, innerWidth]") == [320, 320], state
        assert page.run(small) == [], state
        page.run("scrollTo(0, 0)")
        page.screenshot(SHOTS / f"phone_{state}.png")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_can_be_read_in_both_colour_schemes(page: Page, fake: Fake, fake_address: str, dark: bool) -> None:
    page.emulate(width=1280, height=1400, dark=dark)
    page.open(fake_address)
    paper = page.run("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) < 0.05) == dark
    found = page.run(COLOURS)
    fill(page, fake)
    found += page.run(COLOURS)
    words = " ".join(entry["words"] for entry in found)
    for expected in ("Put a picture", "Ask", "API key", "not a picture", "75.0 %", "asks for an API key", "request", "cat"):
        assert expected in words
    for entry in found:
        one, other = sorted((luminance(entry["ink"]), luminance(entry["paper"])))
        assert (other + 0.05) / (one + 0.05) >= entry["needed"], entry
    page.screenshot(SHOTS / f"full_{'dark' if dark else 'light'}.png")


COLOURS = """(() => {
    const solid = (node) => {
        for (; node; node = node.parentElement) {
            const colour = getComputedStyle(node).backgroundColor;
            if (colour !== "rgba(0, 0, 0, 0)") return colour;
        }
    };
    const found = [];
    for (const node of document.querySelectorAll("body *")) {
        const own = [...node.childNodes].filter((child) => child.nodeType === 3).map((child) => child.data.trim()).join("");
        const style = getComputedStyle(node);
        if (!node.checkVisibility({opacityProperty: true}) || node.closest(".unseen")) continue;
        const size = parseFloat(style.fontSize);
        const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
        if (own) found.push({words: own, ink: style.color, paper: solid(node), needed: large ? 3 : 4.5});
        if (node.matches("textarea, input:not([type=file], [type=radio])")) {
            found.push({words: node.value || node.placeholder, ink: style.color, paper: solid(node), needed: 4.5});
            const hint = getComputedStyle(node, "::placeholder").color;
            found.push({words: node.placeholder, ink: hint, paper: solid(node), needed: 4.5});
            found.push({words: "edge of " + node.id, ink: style.borderTopColor, paper: solid(node.parentElement), needed: 3});
        }
    }
    return found;
})()"""


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2 for `rgb(r, g, b)`."""
    assert colour.startswith("rgb("), colour
    parts = [int(part) / 255 for part in colour[4:-1].split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@needs_chromium
def test_nothing_moves_for_those_who_want_no_motion(page: Page, fake: Fake, fake_address: str) -> None:
    caret = "getComputedStyle(document.querySelector('.answer'), '::after').animationName"
    page.open(fake_address)
    put(page)
    ask(page, "what is it?")
    asked = fake.asked()
    asked.piece("a")
    page.until("document.querySelector('.answer').textContent === 'a'")
    assert page.run(caret) == "blink"
    page.emulate(width=1280, height=800, still=True)
    assert page.run(caret) == "none"
    assert page.run("document.getAnimations().length") == 0
    asked.answer("a")
    page.until(DONE)
