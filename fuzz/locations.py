"""What a model wrote for `detect` or `segment`: objects within their limits, that come back when they are written."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

if __name__ == "__main__":
    import atheris  # noqa: F401 - `instrumented` looks for it

from fuzz.target import Choices, fuzz, instrumented

with instrumented():
    from pgfast.locations import BINS, CODES, MASK_CODES, Objects, box_in_pixels, format_locations, parse, parse_tokens

MARKERS = [f"<loc{bin:04d}>" for bin in range(BINS)] + [f"<seg{code:03d}>" for code in range(CODES)]
WORDS = [
    " ; ",
    ";",
    " cat",
    " dog",
    "<",
    ">",
    "<loc",
    "<loc12>",
    "<loc1024>",
    "<seg128>",
    "\n",
    " ",
    "é",
    "\ufffd",
    "",
    "<eos>",
]
PIECES = MARKERS + WORDS

_MARKER = re.compile(r"<(?:loc[0-9]{4}|seg[0-9]{3})>")


class Vocabulary:
    """A tokenizer with one token for each piece."""

    def location(self, id: int) -> str | None:
        """Return a marker."""
        return MARKERS[id] if id < len(MARKERS) else None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text."""
        return "".join(PIECES[id] for id in ids)


def check_objects(found: Objects, *, scored: bool) -> None:
    """Look at what was read."""
    assert all("\n" not in problem for problem in found.problems)
    for each in found.objects:
        y0, x0, y1, x1 = each.bins
        assert 0 <= y0 < y1 < BINS
        assert 0 <= x0 < x1 < BINS
        assert len(each.codes) in (0, MASK_CODES)
        assert all(0 <= code < CODES for code in each.codes)
        assert each.label == each.label.strip()
        assert ";" not in each.label
        assert (each.score is not None and 0 <= each.score <= 1) if scored else each.score is None
        left, top, right, bottom = box_in_pixels(each.bins, 640, 480)
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 480


def check(data: bytes) -> None:
    """Read a text, and tokens."""
    text = data.decode("utf-8", "replace")
    check_objects(parse(text), scored=False)
    choices = Choices(data)
    ids: list[int] = []
    logprobs: list[float] = []
    while choices.left and len(ids) < 200:
        # a word or any marker; equal shares, though there are many more markers
        ids.append(len(MARKERS) + choices.number(len(WORDS)) if choices.number(3) == 0 else choices.number(len(MARKERS)))
        logprobs.append(-choices.number(256) / 16 if choices.number(16) else -math.inf)
    found = parse_tokens(ids, logprobs, Vocabulary(), masks=len(data) % 2 == 0)
    check_objects(found, scored=True)
    if any(_MARKER.search(each.label) for each in found.objects):  # spelled by the model in plain letters
        return
    again = parse(format_locations(found.objects))
    assert [(each.label, each.bins, each.codes) for each in again.objects] == [
        (each.label, each.bins, each.codes) for each in found.objects
    ]


if __name__ == "__main__":
    fuzz(check)
