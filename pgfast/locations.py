"""Boxes and masks in the text of `detect` and `segment`: `<loc0256><loc0128><loc0768><loc0896> cat ; ...`, read and written.

An object is four locations (y0, x0, y1, x1), perhaps 16 segment codes, then its label up to `;` or the next object. Models
write other things too: whatever is malformed is left out or mended, and said in words; nothing that a model wrote raises.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

BINS = 1024
"""Locations along a side of the picture: `<loc0000>` to `<loc1023>`."""
CODES = 128
"""Entries of the codebook of masks: `<seg000>` to `<seg127>`."""
MASK_CODES = 16
"""Codes of one mask."""

_MARKER = re.compile(r"<(?:loc([0-9]{4})|seg([0-9]{3}))>")

Bins = tuple[int, int, int, int]


class LocationTokenizer(Protocol):
    """What `parse_tokens` needs of `pgfast.prompt.Tokenizer`."""

    def location(self, id: int) -> str | None:
        """Return `<locYYYY>` or `<segXXX>`; None for every other token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""


@dataclass(frozen=True, slots=True)
class Located:
    """An object that the model named."""

    label: str
    """Without spaces around it; empty if the model gave none."""
    bins: Bins
    """y0, x0, y1, x1 with y0 < y1 and x0 < x1, each below `BINS`."""
    codes: tuple[int, ...]
    """16 codes of the mask, each below `CODES`; empty without a (usable) mask."""
    score: float | None
    """Product of the probabilities of the four location tokens and of the label's tokens; None if only the text is known.

    Each is under the full softmax, given all that stands before it: the probability that the model writes this box with this
    label at this place. Separator and mask codes do not count. A label that only the caller knows counts as 1.
    """


@dataclass(frozen=True, slots=True)
class Objects:
    """What could be read."""

    objects: tuple[Located, ...]
    problems: tuple[str, ...]
    """What was malformed and what became of it, a line each; empty when all is well."""


def parse(text: str, *, default_label: str = "") -> Objects:
    """Read a text; without probabilities nothing has a score.

    Args:
        text: What the model wrote.
        default_label: Of objects without a label; given one, its absence is no problem.
    """
    reader, place = _Reader(default_label), 0
    for found in _MARKER.finditer(text):
        reader.text(text[place : found.start()], math.nan)
        reader.marker(found, math.nan)
        place = found.end()
    reader.text(text[place:], math.nan)
    return reader.result()


def parse_tokens(
    ids: Sequence[int], logprobs: Sequence[float], tokenizer: LocationTokenizer, *, default_label: str = "", masks: bool = False
) -> Objects:
    """Read generated tokens: only real location tokens count, and every object has its score.

    Args:
        ids: Generated ids; `<eos>` and the like are skipped.
        logprobs: Natural log-probability of each.
        tokenizer: The bundle's.
        default_label: As in `parse`.
        masks: Every object should have one; the absence of all its codes is a problem then.
    """
    reader = _Reader(default_label, masks=masks)
    between: list[tuple[int, float]] = []
    for token in zip(ids, logprobs, strict=True):
        found = _MARKER.fullmatch(tokenizer.location(token[0]) or "")
        if found is None:
            between.append(token)
            continue
        reader.text(*_text(between, tokenizer))
        reader.marker(found, token[1])
        between = []
    reader.text(*_text(between, tokenizer))
    return reader.result()


def format_locations(objects: Sequence[Located]) -> str:
    """Write objects as the model does; `parse` reads the same ones back (labels without `;` and markers)."""
    return " ; ".join(
        "".join([*(f"<loc{bin:04d}>" for bin in o.bins), *(f"<seg{code:03d}>" for code in o.codes), f" {o.label}"]).rstrip()
        for o in objects
    )


def box_in_pixels(bins: Bins, width: int, height: int) -> tuple[float, float, float, float]:
    """Return x0, y0, x1, y1 in pixels of a picture that was squashed to the model's square; nothing is rounded.

    Bin / 1024 * size, as Google's documentation of PaliGemma and its demo on Hugging Face have it. big_vision's training op and
    evaluator for RefCOCO (pp/proj/paligemma/segmentation.py, evaluators/proj/paligemma/transfers/segmentation.py) use 1023
    instead, which moves no edge by more than a thousandth of the side.

    Args:
        bins: y0, x0, y1, x1.
        width: Of the upright picture as it was given.
        height: Of that picture.
    """
    y0, x0, y1, x1 = bins
    return x0 * width / BINS, y0 * height / BINS, x1 * width / BINS, y1 * height / BINS


def _text(tokens: Sequence[tuple[int, float]], tokenizer: LocationTokenizer) -> tuple[str, float]:
    """Return the text of tokens without markers, and the log-probability of those that its first label needs."""
    ids = [id for id, _ in tokens]
    text = tokenizer.decode(ids)
    label = _label(text)
    needed = next(count for count in range(len(ids) + 1) if not label or _label(tokenizer.decode(ids[:count])) == label)
    return text, sum(logprob for _, logprob in tokens[:needed])


def _label(text: str) -> str:
    return text.split(";", 1)[0].strip()


class _Reader:
    """Takes markers and the texts between them, in order; always one text between two markers, often empty."""

    def __init__(self, default_label: str, *, masks: bool = False) -> None:
        self._default, self._masks = default_label, masks
        self._objects: list[Located] = []
        self._problems: list[str] = []
        self._number = 0
        self._bins: list[int] = []
        self._codes: list[int] = []
        self._logprob = 0.0
        self._stray_codes = 0

    def marker(self, found: re.Match[str], logprob: float) -> None:
        if found[1] is None:
            if len(self._bins) == 4:
                self._codes.append(int(found[2]))
            else:
                self._stray_codes += 1
            return
        if len(self._bins) == 4:  # the object before it has no label
            self._finish("", 0.0)
        self._bins.append(int(found[1]))
        self._logprob += logprob

    def text(self, text: str, logprob: float) -> None:
        first, *others = text.split(";")
        if self._bins and (first.strip() or others):
            self._finish(first.strip(), logprob)
        else:
            others.insert(0, first)
        for other in filter(None, map(str.strip, others)):
            self._problems.append(f"text without a box: {_quoted(other)}")

    def result(self) -> Objects:
        if self._bins:
            self._finish("", 0.0)
        if self._stray_codes:
            self._problems.append(f"{self._stray_codes} segment codes do not follow a box")
        return Objects(tuple(self._objects), tuple(self._problems))

    def _finish(self, label: str, logprob: float) -> None:
        """The object is complete; `logprob` is its label's (all nan for a text alone)."""
        bins, codes, logprob = self._bins, tuple(self._codes), self._logprob + logprob
        self._bins, self._codes, self._logprob = [], [], 0.0
        self._number += 1
        what = f"object {self._number}" + (f" ({_quoted(label)})" if label else "")
        if len(bins) < 4:
            self._problems.append(f"{what} has {len(bins)} of 4 locations and was left out")
            return
        if max(bins) >= BINS:
            self._problems.append(f"{what} has location {max(bins)} and was left out: the last one is {BINS - 1}")
            return
        y0, x0, y1, x1 = bins
        if y0 == y1 or x0 == x1:
            self._problems.append(f"{what} has an empty box and was left out")
            return
        if y0 > y1 or x0 > x1:
            self._problems.append(f"{what} has edges in the wrong order: they were swapped")
        if (codes or self._masks) and (len(codes) != MASK_CODES or max(codes) >= CODES):
            wrong = f"{len(codes)} of {MASK_CODES} segment codes" if len(codes) != MASK_CODES else f"segment code {max(codes)}"
            self._problems.append(f"{what} has {wrong}: its box has no mask")
            codes = ()
        if not label and not self._default:
            self._problems.append(f"{what} has no label")
        box = (min(y0, y1), min(x0, x1), max(y0, y1), max(x0, x1))
        self._objects.append(Located(label or self._default, box, codes, None if math.isnan(logprob) else math.exp(logprob)))


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
