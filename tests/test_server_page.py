"""The page at `/`, used as people use it: in a browser, by clicks, keys, drops and the clipboard."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_browser import CHROMIUM, Page, chromium
from page_server import Fake, serving
from PIL import Image
from websockets.sync.client import ClientConnection

from pgfast.engine import Engine
from pgfast.server.app import build_app
from pgfast.server.config import ServerConfig
from pgfast.server.page import FILES

ROOT = Path(__file__).parent.parent
CIRCLE = ROOT / "pgfast" / "demo" / "blue_circle.png"
SHOTS = ROOT / "build" / "screenshots"
QUESTION = "what color is the shape?"
TWO_CATS = "<loc0256><loc0128><loc0768><loc0896> cat ; <loc0000><loc0512><loc0102><loc1023> dog ; <loc0800><loc0100><loc0900><loc0300> cat"
MAX_BODY = 60_000
DONE = "document.querySelector('.entry[aria-current][data-state=done]')"

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientConnection]:
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as connection:
        yield connection


@pytest.fixture(scope="module")
def real(demo: Engine) -> Iterator[str]:
    """The server as `pgfast serve` runs it, with the demo model."""
    with serving(build_app(demo, ServerConfig())) as address:
        yield address


@pytest.fixture(scope="module")
def fake() -> Fake:
    """Answers that the test gives; a test leaves no request behind."""
    return Fake(ServerConfig(max_body=MAX_BODY))


@pytest.fixture(scope="module")
def fake_address(fake: Fake) -> Iterator[str]:
    with serving(fake.app) as address:
        yield address


@pytest.fixture
def page(browser: ClientConnection) -> Iterator[Page]:
    """A tab; afterwards nothing may have gone wrong in it, and nothing gone to another host."""
    page = Page(browser)
    page.emulate(width=1280, height=800)
    yield page
    page.close()
    hosts = {"/".join(address.split("/")[:3]) for address in page.requests if not address.startswith(("data:", "blob:"))}
    assert all(host.startswith("http://127.0.0.1:") for host in hosts)
    assert len(hosts) == 1
    assert page.problems == []


def put(page: Page, picture: Path = CIRCLE) -> None:
    """Choose a picture with the mouse."""
    first = page.run("document.querySelector('#frame').hidden")
    before = page.run("document.querySelectorAll('#strip button').length")
    page.choose_file(picture, lambda: page.click("#empty label" if first else "#strip label"))
    page.until(f"document.querySelectorAll('#strip button').length > {before}")
    page.until("document.querySelector('#picture').complete && document.querySelector('#picture').naturalWidth")


def ask(page: Page, text: str, *, choices: str = "", raw: bool = False) -> None:
    for selector, words in (("#text", text), ("#choices", choices)):
        page.click(selector)
        page.press("a", commands=("selectAll",), modifiers=2)
        page.type(words) if words else page.press("Delete", commands=("delete",))
    page.click(f".modes label:nth-of-type({2 if raw else 1})")
    page.click("#ask button")


def text(page: Page, selector: str) -> str:
    found: str = page.run(f"document.querySelector({selector!r}).innerText")
    return found


def percent(share: float) -> str:
    return "> 99.9 %" if 0.9995 <= share < 1 else "< 0.1 %" if 0 < share < 0.0005 else f"{share * 100:.1f} %"


# ---- asking


@needs_chromium
def test_choose_a_picture_ask_and_read_the_answer(page: Page, real: str, demo: Engine) -> None:
    page.open(real)
    put(page)
    assert "640 × 640" in text(page, "#caption")
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
    shown = page.run("[...document.querySelectorAll('.shares li')].map((li) => [li.children[0].innerText, li.children[2].innerText])")
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
    assert page.run("[...document.querySelectorAll('.entry')].map((node) => node.dataset.state)") == ["waiting", "waiting", "running"]
    assert fake.idle
    page.click(".entry:nth-child(1) .stop")  # third: never asked
    page.press("Escape")  # first: in the middle
    assert first.gone.wait(20)
    second = fake.asked()
    assert second.fields == [("question", "second")]
    second.answer("yes")
    page.until("document.querySelector('.entry:nth-child(2)').dataset.state === 'done'")
    assert page.run("[...document.querySelectorAll('.entry')].map((node) => node.dataset.state)") == ["stopped", "done", "stopped"]
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
    assert text(page, "[aria-current] .answer") == "2 × cat, dog"
    assert page.run("document.querySelectorAll('.box').length") == 3
    fields = "[document.querySelector('[name=mode]:checked').value, ...['text', 'choices'].map((id) => document.getElementById(id).value)]"
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
    assert "tokens: this model takes at most 96" in line
    assert "\n" not in line
    page.problems.clear()  # Chromium logs every 400


@needs_chromium
def test_an_api_key_is_asked_for_and_kept_for_the_tab(page: Page, demo: Engine) -> None:
    with serving(build_app(demo, ServerConfig(api_keys=("open-sesame",)))) as address:
        page.open(address)
        put(page)
        ask(page, QUESTION)
        page.until("document.activeElement.id === 'key-text'")
        notice = "document.querySelector('#notice').innerText"
        for key, line in (("schlüssel", "An API key has plain"), ("wrong", "The server does not accept this"), ("open-sesame", "")):
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
    with serving(fake.app) as address:
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
def test_pictures_over_the_limit_are_made_smaller_and_stay_upright(page: Page, fake: Fake, fake_address: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 90, (300, 400, 3), dtype=np.uint8)
    noise[:, :200, 0] += 150  # the left half is red; upright (a quarter to the right) the upper one
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    assert (tmp_path / "turned.jpg").stat().st_size > MAX_BODY
    page.open(fake_address)
    put(page, tmp_path / "turned.jpg")
    assert "300 × 400, sent as" in text(page, "#caption")
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
    small = """[...document.querySelectorAll("button, label:has(input), textarea, input:not([type=file], [type=radio]), summary")]
        .filter((node) => node.checkVisibility())
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
        if (!node.checkVisibility({visibilityProperty: true, opacityProperty: true}) || node.closest(".unseen, template")) continue;
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


# ---- how it is served


@needs_chromium
def test_the_policy_stops_what_the_page_did_not_bring(page: Page, real: str) -> None:
    page.open(real)
    page.run("""(() => {
        const script = document.createElement("script");
        try { script.textContent = "window.ran = true"; } catch { window.refused = true; }
        document.body.append(script);
        const image = new Image();
        image.src = "https://example.com/pixel.png";
        document.body.append(image);
    })()""")
    page.until("window.refused")
    assert page.run("window.ran") is None
    page.run("0")
    assert any("img-src" in problem for problem in page.problems)
    assert any("TrustedScript" in problem or "trusted" in problem.lower() for problem in page.problems)
    page.problems.clear()
    page.requests = [address for address in page.requests if "example.com" not in address]


def get(address: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(address, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, {k.lower(): v for k, v in response.headers.items()}, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def test_every_file_is_served_once_and_safely(real: str) -> None:
    addresses = ["", "page/example.png", *(f"page/{path.name}" for path in FILES.iterdir() if path.suffix != ".html")]
    assert len(addresses) >= 8
    for name in addresses:
        status, headers, content = get(real + name)
        assert status == 200, name
        assert headers["x-content-type-options"] == "nosniff"
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert headers["cache-control"] == "no-cache"
        for known in (headers["etag"], f'"other", W/{headers["etag"]}', "*"):
            status, again, nothing = get(real + name, If_None_Match=known)
            assert (status, nothing, again["etag"]) == (304, b"", headers["etag"])
        status, _, same = get(real + name, If_None_Match='"other"')
        assert (status, same) == (200, content)
    assert get(real + "page/index.html")[0] == 404
    assert get(real + "page/%2e%2e/page.py")[0] == 404


@pytest.mark.parametrize("path", sorted(FILES.glob("*.js")), ids=lambda path: path.name)
def test_modules_parse(path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    source = path.read_bytes()
    done = subprocess.run(["node", "--check", "--input-type=module"], input=source, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert all(len(line) <= 128 for line in source.decode().splitlines())


def test_events_in_pieces_of_any_size() -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    stream = 'event: piece\r\ndata: {"text":\ndata:  "ä → 🐈"}\n\n: comment\n\nevent: answer\ndata: {"n": 1}\n\nevent: cut\ndata: {}\n'
    script = f"""
        import {{ serverSentEvents }} from {json.dumps((FILES / "client.js").as_uri())};
        const bytes = new TextEncoder().encode({json.dumps(stream)});
        for (const size of [1, 2, 3, 7, 1000]) {{
            const parts = [];
            for (let at = 0; at < bytes.length; at += size) parts.push(bytes.slice(at, at + size));
            const found = [];
            for await (const event of serverSentEvents(ReadableStream.from(parts))) found.push(event);
            console.log(JSON.stringify(found));
        }}"""
    done = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True)
    expected = [{"event": "piece", "data": {"text": "ä → 🐈"}}, {"event": "answer", "data": {"n": 1}}]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [expected] * 5
