"""What a user does with the page, and what the page's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from page_browser import CHROMIUM, Page

ROOT = Path(__file__).parent.parent
CIRCLE = ROOT / "pgfast" / "demo" / "blue_circle.png"
SHOTS = ROOT / "build" / "screenshots"
QUESTION = "what color is the shape?"
TWO_CATS = (
    "<loc0256><loc0128><loc0768><loc0896> cat ; "
    "<loc0000><loc0512><loc0102><loc1023> dog ; "
    "<loc0800><loc0100><loc0900><loc0300> cat"
)
MAX_BODY = 60_000
DONE = "document.querySelector('.entry[aria-current][data-state=done]')"

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")


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
